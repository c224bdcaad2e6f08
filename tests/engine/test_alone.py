"""Runs on texts alone: two processes equal one, a run resumes exactly, and losses that need groups are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError
from tests.engine.jobs import losses_of
from tests.engine.running import copy_run
from tests.helpers.launch import launch
from tests.helpers.rooms import settings
from tests.helpers.server import serving

OFF = {name: {"weight": 0.0} for name in ("contrastive", "response", "layer")}
LOSSES: dict[str, Any] = {**OFF, "embedding": {"weight": 1.0}}


def write(rooms: Path, folder: Path, name: str, **sections: Any) -> Path:
    """The configuration of a run on the collection's own texts, queries and passages."""
    texts = rooms / "data" / "alone"
    texts.mkdir(exist_ok=True)
    for file in ("corpus", "queries"):
        lines = [json.loads(line)["text"] for line in (rooms / "data" / f"{file}.jsonl").read_text().splitlines()]
        (texts / f"{file}.txt").write_text("\n".join(lines))
    data = {"format": "texts", "train": "alone", "negatives": 0}
    train = {"steps": 4, "batch_size": 8, "save_every": 2, **sections.pop("train", {})}
    tree = settings(rooms, folder / name, **{"losses": LOSSES, "data": data, **sections, "train": train})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_two_processes_equal_one_and_a_run_resumes(rooms: Path, tmp_path: Path) -> None:
    alone = write(rooms, tmp_path, "alone")
    packed = write(rooms, tmp_path, "packed", student={"path": "student", "normalize": True, "passes": "packed"})
    both = write(rooms, tmp_path, "both", train={"batch_size": 4}, extra_teacher={"placement": "zero3"})
    [[losses, in_passes]] = launch("tests.engine.jobs:distil_each", 1, configs=[str(alone), str(packed)])
    [[split], _] = launch("tests.engine.jobs:distil_each", 2, configs=[str(both)])
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(split, losses, rtol=1e-5)
    np.testing.assert_allclose(in_passes, losses, rtol=1e-4)
    half = copy_run(alone, "resumed", step=2)
    distill(load_config(half), resume=True, quiet=True)
    assert losses_of(tmp_path / "resumed") == losses


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("losses.response.weight=1", r"losses\.response\.weight: compares a query with its passages"),
        ("losses.layer.weight=1", r"losses\.layer\.weight"),
        ("losses.contrastive.weight=1", r"losses\.contrastive\.weight"),
        ("teacher.train=true teacher.dtype=auto", r"teacher\.train: texts alone teach a teacher nothing"),
        ("data.negatives=2", r"data\.negatives: is ignored"),
        ("teacher.kind=colbert", r"teacher\.kind: a colbert gives no vector of a text alone"),
    ],
)
def test_what_needs_groups_is_refused(rooms: Path, tmp_path: Path, override: str, told: str) -> None:
    path = write(rooms, tmp_path, "run")
    with pytest.raises(InputError, match=told):
        distill(load_config(path, override.split()), quiet=True)
    assert not (tmp_path / "run").exists()


def test_losses_of_vectors_train(rooms: Path, tmp_path: Path) -> None:
    losses = {**LOSSES, "similarity": {"weight": 1.0}, "order": {"weight": 1.0}, "spread": {"weight": 1.0}}
    path = write(rooms, tmp_path, "run", losses=losses, train={"steps": 1})
    distill(load_config(path), quiet=True)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert all(
        np.isfinite(row["parts"][name]) and row["parts"][name] > 0 for name in ("embedding", "similarity", "spread")
    )


def test_a_served_teacher_is_asked_for_each_text(rooms: Path, tmp_path: Path) -> None:
    with serving(lambda texts: [[float(len(text)), 1.0, -1.0] for text in texts]) as server:
        teacher = {"kind": "served", "api": "embeddings", "url": server.url(), "model": "tiny", "query_prompt": "Q: "}
        tree = yaml.safe_load(write(rooms, tmp_path, "run", train={"steps": 1}).read_text())
        path = tmp_path / "served.yaml"
        path.write_text(yaml.safe_dump({**tree, "teacher": {**teacher, "answers": str(tmp_path / "answers")}}))
        distill(load_config(path), quiet=True)
        asked = set(server.texts)
        queries = (rooms / "data" / "alone" / "queries.txt").read_text().splitlines()
        assert asked
        assert all(text.startswith("Q: ") == (text.removeprefix("Q: ") in queries) for text in asked)
        with pytest.raises(InputError, match=r"teacher\.kind: a served gives no vector of a text alone"):
            distill(load_config(path, [f"output={tmp_path / 'other'}", "teacher.api=cohere"]), quiet=True)
