"""The exported student is the mean of the last checkpoints, of equal weights or of weights searched on dev."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lead_ds.retrieval.evaluate import evaluate_path
from tests.engine.jobs import distil_each

TRAIN: dict[str, Any] = {"batch_size": 4, "lr": 5e-3, "schedule": "constant", "warmup_ratio": 0.0, "save_every": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_the_mean_of_checkpoints_is_exported(configure: Callable[..., Path], tmp_path: Path) -> None:
    evaluation = {"split": "dev", "metric": "nDCG@10", "measures": ["nDCG@10"]}
    two = configure("two", train={**TRAIN, "steps": 2})
    four = configure("four", train={**TRAIN, "steps": 4})
    mean = configure("mean", train={**TRAIN, "steps": 4, "average": 2})
    searched = configure(
        "searched", train={**TRAIN, "steps": 4, "average": 2, "average_by": "dev"}, evaluation=evaluation
    )
    many = configure("many", train={**TRAIN, "steps": 2, "average": 3})
    told = distil_each([str(path) for path in (two, four, mean, searched, many)])
    assert "3 checkpoints are to be averaged, 2 steps save 1 (set train.save_every: 1)" in told[4]
    a, b, c = (weights(tmp_path / name) for name in ("two", "four", "mean"))
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name in a:
        torch.testing.assert_close(c[name], (a[name] + b[name]) / 2)
    assert (
        "Weights: the mean of step-00000002, step-00000004."
        in (tmp_path / "mean" / "student" / "README.md").read_text()
    )

    found = json.loads((tmp_path / "searched" / "average.json").read_text())
    data = yaml.safe_load(two.read_text())["data"]["path"]
    measured = [
        evaluate_path(tmp_path / run / "student", data, "dev", ["nDCG@10"], quiet=True)["nDCG@10"]
        for run in ("two", "four", "searched")
    ]
    assert found["value"] == pytest.approx(measured[2], abs=1e-6)
    assert found["value"] >= max(measured[:2]) - 1e-6
