"""Callbacks see what the run records, and end it on every process at the same step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.running import steps_of
from tests.helpers.launch import launch

Configure = Callable[..., Path]
JOB = "tests.engine.callback_jobs:watched"
EVALUATED = {"split": "dev", "queries": 4}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("world", [1, 2])
def test_callbacks(configure: Configure, tmp_path: Path, world: int) -> None:
    train = {"log_every": 3, "save_every": 4, "evaluate_every": 4}
    paths = {
        name: str(configure(name, train=train, evaluation=EVALUATED, student={"path": "student"}))
        for name in ("whole", "stopped", "evaluated", "saved", "broken", "all")
    }
    last = world - 1
    cases: list[dict[str, Any]] = [
        {"config": paths["whole"]},
        {"config": paths["stopped"], "at": ["step", 2]},
        {"config": paths["evaluated"], "at": ["evaluation", 4]},
        {"config": paths["saved"], "at": ["checkpoint", 4]},
        {"config": paths["broken"], "at": ["step", 2], "error": True},
        {"config": paths["all"], "at": ["step", 1], "rank": last, "all": True},
        {"config": paths["stopped"], "resume": True},
    ]
    ranks = launch(JOB, world, cases=cases)
    whole, stopped, evaluated, saved, broken, everywhere, resumed = ranks[0]

    told, error = whole
    assert error == ""
    rows = rows_of(tmp_path / "whole")
    expected = [["step", r["step"], r["loss"], r["parts"]["response"], r["lr"]] for r in rows if "loss" in r]
    assert [event for event in told if event[0] == "step"] == expected
    assert [event for event in told if event[0] == "evaluation"] == [
        ["evaluation", r["step"], r["evaluation"]["nDCG@10"]] for r in rows if "evaluation" in r
    ]
    # A step is told when it is read from the device: with its log interval, or where an evaluation waits for it anyway.
    order = ["start 0", "step 1", "step 2", "step 3", "step 4", "evaluation 4", "checkpoint 4"]
    order += ["step 5", "step 6", "evaluation 6", "checkpoint 6", "end 6"]
    assert [f"{event[0]} {event[1]}" for event in told] == order
    assert told[0] == ["start", 0, 6, world]

    for (told, error), name, step in ((stopped, "stopped", 3), (evaluated, "evaluated", 4), (saved, "saved", 4)):
        assert error == ""
        assert told[-1] == ["end", step]
        assert ["checkpoint", step] in told
        assert ["evaluation", step] in [event[:2] for event in told]
        assert (tmp_path / name / "student" / "modules.json").exists()
    assert error == ""

    assert broken[1].startswith("callback Watch: ValueError: my own mistake")
    assert not (tmp_path / "broken" / "student").exists()
    assert everywhere[0][-1] == ["end", 3]
    if world > 1:
        assert all(not told for told, _ in [ranks[1][0], *ranks[1][2:5]])  # process 0 alone is told
        assert ranks[1][4][1] == broken[1]
        assert ranks[1][5] == everywhere

    # A run that a callback ended goes on as if it had not been.
    assert resumed[0][0] == ["start", 3, 6, world]
    assert steps_of(tmp_path / "stopped") == 6
    losses = {r["step"]: r["loss"] for r in rows_of(tmp_path / "stopped") if "loss" in r}
    assert losses == {r["step"]: r["loss"] for r in rows if "loss" in r}
