"""What is fitted before the first step: equal on one process and two, read again on resume; a map that is kept serves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.engine.jobs import distil_each
from tests.engine.running import copy_run
from tests.helpers.launch import launch

JOB = "tests.engine.jobs:distil_each"
ALONE: dict[str, Any] = {name: {"weight": 0} for name in ("contrastive", "response", "layer")}
TRAIN: dict[str, Any] = {"steps": 4, "batch_size": 4, "lr": 0.01, "save_every": 2}


def test_fitted_once_and_kept(configure: Callable[..., Path], tmp_path: Path, rooms: Path) -> None:
    student = {"path": "student", "normalize": True, "passage_length": 48}
    pca = {**ALONE, "embedding": {"weight": 1.0, "into": "pca", "sample": 64}}
    kept = {
        **ALONE,
        "embedding": {"weight": 1.0, "keep": True, "start": "ridge", "sample": 600, "distance": "mse"},
        "order": {"weight": 1.0},
        "focal": {"weight": 0.1},
    }
    alone = configure("alone", losses=pca, train=TRAIN)
    both = configure("both", losses=pca, train={**TRAIN, "batch_size": 2})
    keep = configure("keep", losses=kept, train=TRAIN, student=student)
    whole, into_teacher = distil_each([str(alone), str(keep)])
    again = copy_run(alone, "again", step=2)
    broken = copy_run(alone, "broken", step=2)
    basis = (tmp_path / "alone" / "fitted.safetensors").read_bytes()
    (tmp_path / "again" / "fitted.safetensors").write_bytes(basis)
    (tmp_path / "broken" / "fitted.safetensors").write_bytes(basis[:-4] + b"\0\0\0\0")
    [[split], _] = launch(JOB, 2, configs=[str(both)])
    resumed, refused = distil_each([str(again), str(broken)], resume=True)
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    assert resumed == whole
    assert "fitted.safetensors: does not hold embedding.basis as it was written" in refused
    torch.testing.assert_close(
        load_file(tmp_path / "both" / "fitted.safetensors")["embedding.basis"],
        load_file(tmp_path / "alone" / "fitted.safetensors")["embedding.basis"],
    )
    assert len(into_teacher) == 4

    from sentence_transformers import SentenceTransformer

    from lead_ds.models.load import load_encoder

    served = SentenceTransformer(str(tmp_path / "keep" / "student"), device="cpu")
    assert [type(module).__name__ for module in served] == ["Transformer", "Pooling", "Dense", "Normalize"]
    theirs = served.encode_document(["a text", "another one"], convert_to_tensor=True)
    assert theirs.shape == (2, 32)  # the teacher's width
    scorer, encoder = load_encoder(tmp_path / "keep" / "student")
    with torch.no_grad():
        ours = scorer.embed(encoder.passages(["a text", "another one"]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_kept_pca_begins_on_the_teachers_main_directions(configure: Callable[..., Path]) -> None:
    """The teacher itself as a student: with the layer in closed form it is there before it has learned anything."""
    section = {"weight": 1.0, "into": "pca", "sample": 600}
    itself = {"path": "llama", "normalize": False, "dims": [8, 32]}
    train = {**TRAIN, "steps": 1, "save_every": 1, "lr": 1e-8}
    ways: dict[str, Any] = {"apart": {}, "ridge": {"keep": True}, "turned": {"keep": True, "start": "orthogonal"}}
    losses = {name: {**ALONE, "embedding": {**section, **how}} for name, how in ways.items()}
    configs = [configure(name, losses=losses[name], train=train, student=itself) for name in ways]
    [[apart], [ridge], [turned]] = distil_each([str(path) for path in configs])
    assert ridge < 0.01 * apart
    assert turned < 1e-5
