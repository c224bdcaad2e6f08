"""Runs of seconds, from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lead_ds import Distiller

THINGS = [
    "octopus",
    "glacier",
    "violin",
    "volcano",
    "honeybee",
    "lighthouse",
    "compass",
    "bread",
    "telescope",
    "camel",
    "bridge",
    "piano",
]
ROWS = [
    {"query": f"which {thing}", "positives": [f"the {thing} is this"], "negatives": [f"{other} is that"]}
    for thing, other in zip(THINGS, [*THINGS[1:], THINGS[0]], strict=True)
]


@pytest.fixture
def distiller(rooms: Path, tmp_path: Path) -> Callable[..., Distiller]:
    """A run of a tiny student under a tiny cross-encoder; its output is `tmp_path/NAME`."""

    def make(name: str = "run", **settings: Any) -> Distiller:
        settings = {
            "teacher": {"path": rooms / "cross", "kind": "cross_encoder", "dtype": "fp32", "max_length": 64},
            "student": rooms / "student",
            "data": ROWS,
            "losses": {"contrastive": {}, "response": {}, "layer": {"k": 2}},
            "steps": 3,
            "batch_size": 4,
            "negatives": 2,
            "lr": 1e-3,
            "log_every": 1,
            "seed": 3,
            "kernels": "torch",
            "monitor": {"tensorboard": False, "csv": False},
            "output": tmp_path / name,
            **settings,
        }
        return Distiller(**settings)

    return make
