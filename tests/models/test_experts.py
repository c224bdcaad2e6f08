"""Teachers with experts under ZeRO-3, whose tokens reach other experts on each process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.launch import launch
from tests.models.expert_models import FAMILIES, expert_model

MODELS = [*FAMILIES, "own"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process says of each model."""
    paths = [expert_model(tmp_path_factory.mktemp(name), name) for name in MODELS]
    told = launch("tests.models.expert_models:sharded", 2, paths=paths)
    return {name: [one[i] for one in told] for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_sharded_experts_say_what_whole_ones_say(answers: dict[str, list[dict[str, Any]]], name: str) -> None:
    for answer in answers[name]:
        assert answer["sharded"]
        assert answer["differ"], "the processes' tokens reach the same experts"
        assert answer["worst"] < 1e-5
        assert answer["left"] == 0


@pytest.mark.slow
def test_experts_are_trained(configure: Callable[..., Path], tmp_path: Path) -> None:
    """Of few tokens, that reach other experts on each process: the same losses under each stage of ZeRO, or a refusal."""
    cases = []
    for name in ("qwen3_moe", "own"):
        (tmp_path / name).mkdir()
        teacher = {"path": expert_model(tmp_path / name, name), "trust_remote_code": True, "pooling": "last"}
        teacher |= {"query_length": 3, "passage_length": 3}
        for stage in (1, 2, 3):
            config = configure(
                f"{name}-{stage}",
                extra_teacher=teacher,
                data={"negatives": 1},
                losses={"contrastive": {"temperature": 0.1}},
                train={"steps": 4, "batch_size": 1, "save_every": 4},
                deepspeed={"student": f"ds_configs/student_zero{stage}.json"},
            )
            cases.append((str(config), "teacher"))
    fused, *sharded, own, again, refused = launch("tests.engine.jobs:warm_each", 2, cases=cases)[0]
    assert len(fused) == len(own) == 4
    for losses in sharded:
        np.testing.assert_allclose(losses, fused, rtol=1e-4)
    np.testing.assert_allclose(again, own, rtol=1e-4)
    assert (
        "deepspeed.student: is of stage 3, which cannot train experts that are modules of their own (Block)" in refused
    )
