"""A run leaves nothing in its process: no thread, no open file, no tensor, no group of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.launch import launch

Configure = Callable[..., Path]
TRAIN = {"steps": 2, "save_every": 2}


def zero(stage: int) -> dict[str, str]:
    return {"student": f"ds_configs/student_zero{stage}.json"}


def test_runs_one_after_the_other_leave_nothing(configure: Configure) -> None:
    measured = {"evaluation": {"split": "dev", "queries": 4}, "monitor": {"tensorboard": True, "csv": True}}
    kinds: dict[str, dict[str, Any]] = {
        "evaluated": {**measured, "train": {**TRAIN, "evaluate_every": 2}},
        "sharded teacher": {"extra_teacher": {"placement": "zero3"}, "deepspeed": zero(0)},
        "bf16": {"student": {"dtype": "bf16"}, "deepspeed": zero(2)},
        "fp16": {"student": {"dtype": "fp16"}, "deepspeed": zero(1)},
        "sharded student": {"deepspeed": zero(3)},
        "broken": {},
    }
    configs = {name: str(configure(name, **{"train": TRAIN, **kind})) for name, kind in kinds.items()}
    [found] = launch("tests.engine.left_jobs:each", 1, configs=configs, rounds=2)
    for name, (before, after) in found.items():
        assert after == before, name
        assert after["threads"] == {"python": 1}, name
        assert after["engines"] == 0 or name == "broken", name  # its error is at hand until its handler ends


def test_a_fork_may_collect_the_garbage_of_a_run(configure: Configure) -> None:
    trained = configure("trained", train=TRAIN, deepspeed=zero(0))  # whose garbage Python's collector has always seen
    sharded = configure("sharded", extra_teacher={"placement": "zero3"})
    assert launch("tests.engine.left_jobs:forks", 1, trained=str(trained), sharded=str(sharded)) == [[0, 0, 0]]


def test_a_student_in_shards_that_a_callback_keeps_holds_no_group(configure: Configure) -> None:
    path = configure(train=TRAIN, deepspeed=zero(3))
    assert launch("tests.engine.left_jobs:kept_shards", 1, path=str(path)) == [{"python": 1}]


def test_a_student_that_a_callback_keeps_is_a_plain_module(configure: Configure) -> None:
    assert all(launch("tests.engine.left_jobs:kept_student", 1, path=str(configure(train=TRAIN)))[0])
