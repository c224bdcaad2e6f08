"""The recipes that are not LEAD's own run in small: their losses and data, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.helpers.launch import ROOT, launch
from tests.helpers.rooms import TEACHERS

# What stands for the models and texts of each recipe; where a section is a list, for its items in turn.
VECTORS = {"path": "bert", "query_length": 32, "passage_length": 48}
STUDENT = {"path": "student", "query_length": 32, "passage_length": 48}
RERANKER = {name: TEACHERS["llm_reranker"][name] for name in ("path", "max_length", "yes_token", "no_token")}
SMALL: dict[str, dict[str, Any]] = {
    "align_texts": {"teacher": VECTORS, "student": {**STUDENT, "dims": [8, 32]}, "data": {"train": "texts"}},
    "align_then_contrast": {"teacher": VECTORS, "student": {**STUDENT, "path": "bert", "dims": [8, 32]}},
    "reranker_listwise": {
        "teacher": {**RERANKER, "batch_size": 16, "template": "{query} {passage}"},
        "student": STUDENT,
    },
    "cut_student_lead": {
        "teacher": VECTORS,
        "student": {**STUDENT, "path": "bert", "layers": [0, 1]},
        "losses": {"layer": {"teacher_layers": [0, 1], "student_layers": [0, 1]}},
    },
    "two_teachers": {"teachers": [VECTORS, {"path": "cross", "max_length": 64}], "student": STUDENT},
}


def merged(tree: Any, change: Any) -> Any:
    """A tree with the values of another in place of its own."""
    if isinstance(tree, list) and isinstance(change[0], dict):
        return [merged(*pair) for pair in zip(tree, change, strict=True)]
    if not (isinstance(tree, dict) and isinstance(change, dict)):
        return change
    return {**tree, **{name: merged(tree.get(name), value) for name, value in change.items()}}


def placed(tree: Any, rooms: Path) -> Any:
    """With the paths of models in the folder of tiny ones."""
    if isinstance(tree, list):
        return [placed(item, rooms) for item in tree]
    return {**tree, "path": str(rooms / tree["path"])} if "path" in tree else tree


def test_every_recipe_runs_in_small(rooms: Path, tmp_path: Path) -> None:
    texts = rooms / "data" / "texts"
    texts.mkdir(exist_ok=True)
    for file in ("corpus", "queries"):
        lines = [json.loads(line)["text"] for line in (rooms / "data" / f"{file}.jsonl").read_text().splitlines()]
        (texts / f"{file}.txt").write_text("\n".join(lines))
    configs = []
    for name, change in SMALL.items():
        tree = yaml.safe_load((ROOT / "ds_configs" / "recipes" / f"{name}.yaml").read_text())
        del tree["pipeline"]
        tree = merged(tree, change)
        for section in ("teacher", "teachers", "student"):
            if section in tree:
                tree[section] = placed(tree[section], rooms)
        tree["data"] |= {"path": str(rooms / "data"), "negatives": min(2, tree["data"]["negatives"]), "workers": 0}
        tree["train"] |= {"steps": 3, "batch_size": 4, "accumulation": 1, "log_every": 1, "lr": 1e-3}
        tree |= {"monitor": {"tensorboard": False, "csv": False}, "output": str(tmp_path / name)}
        configs.append(tmp_path / f"{name}.yaml")
        configs[-1].write_text(yaml.safe_dump(tree))
    [results] = launch("tests.engine.jobs:distil_each", 1, configs=[str(path) for path in configs])
    for name, losses in zip(SMALL, results, strict=True):
        assert not isinstance(losses, str), f"{name}: {losses}"
        assert len(losses) == 3, name
        assert np.isfinite(losses).all(), name
        assert (tmp_path / name / "student" / "model.safetensors").exists(), name
