"""A teacher under ZeRO-3 says what the whole model says, holds its share, lets go after a forward, and does not grow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from lead_ds.teachers.frozen import largest_layer
from tests.helpers.launch import launch
from tests.helpers.rooms import TEACHERS

WORLD, FORWARDS, WINDOW = 2, 100, 25


@pytest.fixture(scope="module")
def facts(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Facts of every kind of teacher, in bf16 as a CPU's default, from each rank."""
    import yaml

    from tests.helpers.rooms import settings

    folder = tmp_path_factory.mktemp("teachers")
    paths = []
    # Persistence is by size: keep only the tiniest tensors, as a large model's threshold would.
    zero3 = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40, "stage3_max_reuse_distance": 0}
    }
    for kind in TEACHERS:
        tree = settings(rooms, folder / kind, kind, extra_teacher={"dtype": "auto"}, deepspeed={"teacher": zero3})
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tree))
        paths.append(str(folder / f"{kind}.yaml"))
    results = launch("tests.engine.jobs:sharded_teachers", WORLD, configs=paths, forwards=FORWARDS)
    return {kind: [result[i] for result in results] for i, kind in enumerate(TEACHERS)}


@pytest.mark.parametrize("kind", TEACHERS)
def test_sharded_features_equal_the_whole_models(facts: dict[str, list[dict[str, Any]]], kind: str) -> None:
    for fact in facts[kind]:
        assert all(fact["equal"]), fact["shapes"]
        assert fact["dtype"] == "torch.bfloat16"


@pytest.mark.parametrize("kind", TEACHERS)
def test_each_rank_holds_its_share(
    facts: dict[str, list[dict[str, Any]]], kind: str, capsys: pytest.CaptureFixture
) -> None:
    for rank, fact in enumerate(facts[kind]):
        with capsys.disabled():
            print(f"\n{kind}: rank {rank} of {WORLD} holds {fact['held']:,} of {fact['whole']:,} bytes", end="")
        # Each tensor is padded to a multiple of W elements: at most W - 1 more than its share, of 2 bytes each.
        assert fact["whole"] / WORLD <= fact["held"] <= fact["whole"] / WORLD + 2 * WORLD * 200


@pytest.mark.parametrize("kind", TEACHERS)
def test_only_persistent_parameters_stay_after_a_forward(facts: dict[str, list[dict[str, Any]]], kind: str) -> None:
    for fact in facts[kind]:
        assert fact["resident"] == fact["persistent"]
        assert 0 < fact["persistent"] * 2 < 0.1 * fact["whole"]


@pytest.mark.parametrize("kind", TEACHERS)
def test_memory_does_not_grow(facts: dict[str, list[dict[str, Any]]], kind: str) -> None:
    """What is kept is kept in every window of forwards; what the allocator takes from the system comes in one of them.

    Gloo's own all-gather loses 82 bytes a call (torch 2.13), 6 kB a forward here.
    """
    for fact in facts[kind]:
        marks = fact["memory"][WINDOW - 1 :: WINDOW]
        grown = [after - before for before, after in pairwise(marks)]
        assert min(grown) < 1_000_000, f"bytes over {WINDOW} forwards each: {grown}"


def test_a_model_without_a_list_of_layers_is_one_layer() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 4)])
    model = torch.nn.Module()
    model.config = PretrainedConfig(num_hidden_layers=2)
    model.whole = layers[1]
    assert largest_layer(model) == 16
    model.layers, model.embedding = layers, torch.nn.Embedding(9, 3)
    assert largest_layer(model) == 16
    model.config.num_hidden_layers = 5
    assert largest_layer(model) == 16 + 12 + 27


def test_a_teacher_deepspeed_configuration_of_another_stage_is_refused(configure: Callable[..., Path]) -> None:
    stage2 = {"teacher": {"zero_optimization": {"stage": 2}}}
    path = configure(extra_teacher={"placement": "zero3"}, deepspeed=stage2, train={"batch_size": 2})
    [first, second] = launch("tests.engine.jobs:distil_each", WORLD, configs=[str(path)])
    assert "needs ZeRO stage 3" in first[0]
    assert first == second
