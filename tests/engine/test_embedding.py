"""losses.embedding in real runs: on one process and two, through the command line, and with teachers that cannot serve it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.helpers.forked import lead_ds
from tests.helpers.launch import launch

Configure = Callable[..., Path]
JOB = "tests.engine.jobs:distil_each"
ALONE: dict[str, Any] = {name: {"weight": 0} for name in ("contrastive", "response", "layer")}
EMBEDDING: dict[str, Any] = {**ALONE, "embedding": {"weight": 1.0}}
TRAIN: dict[str, Any] = {"steps": 4, "batch_size": 4, "lr": 0.01, "save_every": 4}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scores": ({"teacher": "cross_encoder"}, "losses.embedding: compares vectors, and the teacher gives scores"),
    "tokens": (
        {"teacher": "colbert"},
        "losses.embedding: compares vectors of texts, and the teacher gives a vector per",
    ),
    "of pairs": (
        {"student": {"path": "cross", "kind": "cross_encoder", "max_length": 64}},
        "losses.embedding: compares vectors, and the student gives scores",
    ),
    "widths": (
        {"losses": {**ALONE, "embedding": {"weight": 1.0, "into": "same"}}},
        "losses.embedding.into: same needs equal widths: the student's vectors have 16 dimensions, the teacher's 32",
    ),
    "spread of scores": (
        {
            "student": {"path": "cross", "kind": "cross_encoder", "max_length": 64},
            "losses": {**ALONE, "spread": {"weight": 1.0}},
        },
        "losses.spread: compares vectors of texts, and the student gives scores",
    ),
}


def test_two_processes_equal_one_and_what_has_no_vectors_is_refused(configure: Configure, tmp_path: Path) -> None:
    alone = configure("alone", losses=EMBEDDING, train=TRAIN)
    both = configure("both", losses=EMBEDDING, train={**TRAIN, "batch_size": 2})
    others = [
        configure(name.replace(" ", "-"), **{"losses": EMBEDDING, "train": TRAIN, **sections})
        for name, (sections, _) in REFUSED.items()
    ]
    [[losses, *refused]] = launch(JOB, 1, configs=[str(path) for path in (alone, *others)])
    [[split], _] = launch(JOB, 2, configs=[str(both)])
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(split, losses, rtol=1e-5)
    for said, (_, told) in zip(refused, REFUSED.values(), strict=True):
        assert isinstance(said, str), told
        assert told in said
        assert "\n" not in said
    with safe_open(tmp_path / "alone" / "student" / "model.safetensors", "pt") as saved:
        assert not any("embedding.map" in name or "losses" in name for name in saved.keys())  # noqa: SIM118


def test_through_the_command_line(configure: Configure, tmp_path: Path) -> None:
    weights = [f"losses.{name}.weight=1" for name in ("embedding", "similarity", "spread")]
    done = lead_ds("distill", configure(), *weights, "train.steps=2")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        parts = row["parts"]
        assert set(parts) == {"contrastive", "response", "layer", "embedding", "similarity", "spread"}
        assert abs(row["loss"] - sum(parts.values())) < 1e-4 * row["loss"]
        assert all(parts[name] > 0 for name in ("embedding", "similarity", "spread"))
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
