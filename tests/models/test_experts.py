"""Teachers with experts under ZeRO-3, whose tokens reach other experts on each process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.launch import launch
from tests.models.expert_models import FAMILIES, expert_model

MODELS = [*FAMILIES, "own"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process says of each model."""
    paths = [expert_model(tmp_path_factory.mktemp(name), name) for name in MODELS]
    told = launch("tests.models.expert_models:sharded", 2, timeout=120, paths=paths)
    return {name: [one[i] for one in told] for i, name in enumerate(MODELS)}


@pytest.mark.parametrize("name", MODELS)
def test_sharded_experts_say_what_whole_ones_say(answers: dict[str, list[dict[str, Any]]], name: str) -> None:
    for answer in answers[name]:
        assert answer["sharded"]
        assert answer["differ"], "the processes' tokens reach the same experts"
        assert answer["worst"] < 1e-5
        assert answer["left"] == 0
