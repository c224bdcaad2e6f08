"""GradCache gives the plain batch's loss and gradient, under every ZeRO stage, in the memory of a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.config import Config, load_config
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.records.phases import Phases
from lead_ds.engine.training.step import Micro, RankScope
from lead_ds.engine.training.trainee import Trainee, build_engine
from lead_ds.losses import LossShape, ModelFacts, Objective, Side
from lead_ds.models.load import load_student, load_teacher
from lead_ds.models.scorer import Scorer
from lead_ds.plan.activations import Ledger
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teacher import Lesson
from tests.helpers.batches import windows_of
from tests.helpers.launch import launch

Configure = Callable[..., Path]
STUDENTS = ("dual_encoder", "colbert", "cross_encoder")
LAYERS = [1, 3], [0, 2]  # the teacher's, the student's


def gradient(config: Config, here: Ranks, *, recompute: bool | None = None) -> dict[str, Any]:
    """Loss and gradient of a run's first micro-batch, as the optimizer would be given it; bytes alive at most meanwhile."""
    from deepspeed.utils import safe_get_full_grad

    assert config.teacher is not None
    batches = windows_of(config, here)
    cotrained = load_teacher(config.teacher, torch.float32) if config.teacher.train else None
    student = load_student(config.student, torch.float32)
    taught = cotrained or build_teacher(Lesson.of(config), here)
    facts = ModelFacts(config.teacher.kind, taught.num_layers)
    losses = Objective(config.losses, LossShape(ModelFacts(config.student.kind, student.num_layers), facts, "torch"))
    engine = build_engine(Trainee(student, cotrained, losses), config, torch.float32, here)
    if recompute is not None:
        student.recompute = recompute
    window, scope = batches.window(0), RankScope.of("global", here, batches.group_size, "torch", Phases())
    view = None if isinstance(taught, Scorer) else taught.window(window.teachers[0], LAYERS[0])
    micro = Micro(
        window.student[0],
        scope,
        losses.asked([{"layer": LAYERS}]),
        [] if view is None else [Side(view.final, view.layers)],
        window.teachers[0][0] if cotrained else None,
        (window.passage_keys, window.positive_keys),
    )
    torch.manual_seed(5)
    ledger = Ledger({x.untyped_storage()._cdata for x in student.parameters()})
    with ledger:
        output = engine(micro)
        engine.backward(output.loss)
    found = {
        name: safe_get_full_grad(p) if hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") else p.grad
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    return {
        "loss": float(output.loss.detach()),
        "gradient": {name: None if x is None else x.flatten().tolist() for name, x in found.items()},
        "peak": ledger.peak,
    }


def compare(pairs: list[list[list[Any]]]) -> list[list[dict[str, Any]]]:
    """Of each pair of [configuration, queries of a part or None, whether a part's activations are made again]."""
    with ranks() as here:
        results = []
        for pair in pairs:
            found = []
            for path, queries, again in pair:
                config = load_config(path)
                train = config.train.model_copy(update={"grad_cache": queries})
                found.append(gradient(config.model_copy(update={"train": train}), here, recompute=again))
            results.append(found)
        return results


def assert_same(plain: dict[str, Any], cached: dict[str, Any], what: str) -> None:
    assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-5), what
    assert plain["gradient"].keys() == cached["gradient"].keys()
    largest = max(np.abs(x).max() for x in plain["gradient"].values() if x is not None)
    assert largest > 1e-4, what
    for name, x in plain["gradient"].items():
        if x is None:
            assert cached["gradient"][name] is None, (what, name)
        else:
            np.testing.assert_allclose(
                cached["gradient"][name], x, rtol=1e-5, atol=1e-5 * largest, err_msg=f"{what}, {name}"
            )


def case(configure: Configure, kind: str, stage: int, batch_size: int, **more: Any) -> str:
    """A student of a kind, trained at a ZeRO stage on every loss that needs no attention maps."""
    sections: dict[str, Any] = {
        "student": {"kind": kind},
        "extra_teacher": {"placement": "replicate"},
        "losses": {"margin_mse": {"weight": 0.1}},
        "train": {"batch_size": batch_size},
        "deepspeed": {"student": f"ds_configs/student_zero{stage}.json"},
    }
    if kind == "cross_encoder":
        sections["student"] = {"kind": "cross_encoder", "path": "cross", "max_length": 64}
    for name, section in more.items():
        sections[name] |= section
    teacher = "cross_encoder" if kind == "cross_encoder" else "dual_encoder"
    return str(configure(f"{kind}-{stage}-{batch_size}-{len(str(more))}", teacher, **sections))


def plain_and_cached(paths: list[str], world: int) -> list[list[list[dict[str, Any]]]]:
    pairs = [[[path, None, False], [path, 1, True]] for path in paths]
    return launch(f"{__name__}:compare", world, pairs=pairs)


def test_two_ranks_and_every_zero_stage(configure: Configure) -> None:
    which = [(("dual_encoder", "colbert", "cross_encoder", "dual_encoder")[stage], stage) for stage in range(4)]
    paths = [case(configure, kind, stage, 3) for kind, stage in [*which, ("colbert", 3), ("cross_encoder", 3)]]
    for rank, found in enumerate(plain_and_cached(paths, 2)):
        for path, (plain, cached) in zip(paths, found, strict=True):
            assert_same(plain, cached, f"{Path(path).stem}, rank {rank}")


def test_one_rank_keeps_the_activations_of_a_part_and_draws_its_dropout_again(configure: Configure) -> None:
    # ZeRO-0: other stages hold buffers that would drown a tiny model.
    large = [case(configure, kind, 0, 20) for kind in STUDENTS[:2]]
    cotrained = case(configure, "dual_encoder", 1, 4, extra_teacher={"train": True, "path": "bert"})
    checkpointed = case(configure, "dual_encoder", 1, 4, train={"gradient_checkpointing": True})
    dropout = case(configure, "dual_encoder", 1, 4, student={"path": "dropout"})
    pairs = [[[path, None, False], [path, 2, True]] for path in [*large, cotrained, checkpointed]]
    [results] = launch(f"{__name__}:compare", 1, pairs=[*pairs, [[dropout, 1, False], [dropout, 1, True]]])
    for i, (plain, cached) in enumerate(results):
        assert_same(plain, cached, f"case {i}")
    for plain, cached in results[: len(large)]:
        assert cached["peak"] < plain["peak"] / 4, (cached["peak"], plain["peak"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_student_on_every_stage(configure: Configure, world: int) -> None:
    paths = [case(configure, kind, stage, 8 // world) for stage in range(4) for kind in STUDENTS]
    for found in plain_and_cached(paths, world):
        for path, (plain, cached) in zip(paths, found, strict=True):
            assert_same(plain, cached, f"{Path(path).stem} on {world}")


def test_attention_losses_refuse_it() -> None:
    tree = {"student": {"path": "-"}, "teacher": {"path": "-", "kind": "dual_encoder"}, "data": {"path": "-"}}
    tree |= {"losses": {"attention": {"weight": 1.0}}, "train": {"grad_cache": 4}}
    with pytest.raises(ValueError, match=r"train\.grad_cache\s+has no attention maps"):
        Config.model_validate(tree)
