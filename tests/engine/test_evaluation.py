"""Evaluation while training: the same on one process and two, the best checkpoint kept and exported, early stopping."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lead_ds.retrieval.evaluate import evaluate_path
from tests.helpers.launch import launch

JOB = "tests.engine.jobs:distil_each"
EVALUATION = {"split": "dev", "metric": "nDCG@10", "measures": ["nDCG@10", "RR@10"]}


def evaluations(run: Path) -> list[tuple[int, dict[str, float]]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["evaluation"]) for row in rows if "evaluation" in row]


def test_best_student_is_exported_whatever_the_number_of_processes(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    train = {"steps": 8, "evaluate_every": 2, "save_every": 100, "keep": 1, "lr": 5e-3}
    monitor = {"tensorboard": True, "csv": True}
    one = configure("one", train={**train, "batch_size": 4}, evaluation=EVALUATION, monitor=monitor)
    two = configure("two", train={**train, "batch_size": 2}, evaluation=EVALUATION)
    [[_]] = launch(JOB, 1, configs=[str(one)])
    launch(JOB, 2, configs=[str(two)])
    found = evaluations(tmp_path / "one")
    assert [step for step, _ in found] == [2, 4, 6, 8]
    for (_, a), (_, b) in zip(found, evaluations(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    best = json.loads((tmp_path / "one" / "checkpoints" / "best.json").read_text())
    values = {step: value["nDCG@10"] for step, value in found}
    assert best["value"] == max(values.values())
    assert values[best["step"]] == best["value"]
    kept = {path.name for path in (tmp_path / "one" / "checkpoints").glob("step-*")}
    assert kept == {best["checkpoint"], "step-00000008"}
    # The exported student is the best one, read from its files alone.
    again = evaluate_path(tmp_path / "one" / "student", json_data(one), "dev", ["nDCG@10"], quiet=True)
    assert again["nDCG@10"] == pytest.approx(best["value"], abs=1e-6)
    card = (tmp_path / "one" / "student" / "README.md").read_text()
    assert f"| 8 | {values[8]:.4f} |" in card
    logged = list((tmp_path / "one" / "monitor" / "csv").rglob("*nDCG*.csv"))
    assert logged
    rows = list(csv.reader(logged[0].open()))
    assert [float(value) for _, value in rows[1:]] == pytest.approx([values[step] for step in (2, 4, 6, 8)])
    assert list((tmp_path / "one" / "monitor").rglob("events.out.tfevents*"))


def test_early_stopping(configure: Callable[..., Path], tmp_path: Path) -> None:
    # A learning rate too small to change any ranking: the first evaluation stays the best.
    train = {"steps": 40, "evaluate_every": 1, "patience": 3, "lr": 1e-9}
    [[losses]] = launch(JOB, 1, configs=[str(configure("early", train=train, evaluation=EVALUATION))])
    assert len(losses) == 4
    assert [step for step, _ in evaluations(tmp_path / "early")] == [1, 2, 3, 4]
    assert (tmp_path / "early" / "student" / "modules.json").exists()


def json_data(config: Path) -> str:
    import yaml

    return str(yaml.safe_load(config.read_text())["data"]["path"])
