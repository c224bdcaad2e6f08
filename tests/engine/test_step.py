"""What a step asks of a GPU: nothing of ours waits for it between two logs, and every sum has a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import Config
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.numerics import fixed_order
from lead_ds.errors import InputError
from lead_ds.settings.parse import parse_section
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teacher import Lesson
from tests.engine.step_jobs import Steps
from tests.helpers.launch import launch
from tests.helpers.rooms import settings

# DeepSpeed reads the gradient's norm once a step, transformers whether a batch has padding; a branch for CPUs alone.
OTHERS = ("/deepspeed/runtime/", "/transformers/masking_utils.py", "/lead_ds/kernels/attention_kl/chunked.py")


def test_steps_of_every_kind(configure: Callable[..., Path]) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "dual_encoder": {
            "teacher": "dual_encoder",
            "losses": {"similarity": {"weight": 1.0}, "spread": {"weight": 1.0}},
        },
        "attention": {"teacher": "dual_encoder", "losses": {"attention": {"weight": 1.0}}, "same": "bert"},
        "colbert": {"teacher": "colbert"},
        "cross_encoder": {"teacher": "cross_encoder"},
    }
    paths = []
    for name, how in kinds.items():
        student: dict[str, Any] = {"kind": "dual_encoder" if name == "attention" else name, "normalize": False}
        if name == "cross_encoder":
            student |= {"path": "cross", "max_length": 64}
        sections: dict[str, Any] = {"losses": how.get("losses", {})}
        if "same" in how:
            sections["extra_teacher"] = {"path": how["same"], "scale": "none"}
        train = {"steps": 3, "log_every": 3, "save_every": 3, "deterministic": True}
        paths.append(configure(f"steps-{name}", how["teacher"], student=student, train=train, **sections))
    for name, found in zip(
        kinds, launch("tests.engine.step_jobs:watched", 1, configs=list(map(str, paths)))[0], strict=True
    ):
        ours = [wait for wait in found["waits"] if not any(other in wait for other in OTHERS)]
        assert not ours, (name, ours)
        assert not found["unordered"], (name, found["unordered"])
        assert found["attention"] == {"student": "sdpa", "teacher": "sdpa"}
        assert not found["still"], "the run's own setting ends with it"


def test_ranks_agree_on_the_longest_passage_without_a_gpu(configure: Callable[..., Path]) -> None:
    """Each rank's passages have another length; a ColBERT compares their tokens. The losses are those of one process."""
    how: dict[str, Any] = {"student": {"kind": "colbert"}}
    train = {"steps": 4, "accumulation": 2, "save_every": 4, "log_every": 1}
    pair = [
        configure(f"lengths-{world}", "colbert", train=train | {"batch_size": 4 // world}, **how) for world in (2, 1)
    ]
    cotrained = configure("both", "colbert", train=train, extra_teacher={"train": True, "dtype": "fp32"}, **how)
    two = launch("tests.engine.step_jobs:unasked", 2, configs=[str(pair[0]), str(cotrained)])
    assert two[0] == two[1]
    [one] = launch("tests.engine.jobs:distil_each", 1, configs=[str(pair[1])])[0]
    assert two[0][0] == pytest.approx(one, rel=1e-5)
    assert len(two[0][1]) == 4


def test_the_trace_sees_what_it_looks_for() -> None:
    x = torch.tensor([1.0, 2.0])
    with Steps() as mode:
        mode.on = True
        float(x.sum())
        x[x > 1]
        x.nonzero()
        x.cumsum(0)
        torch.arange(3).cumsum(0)
    assert {wait.split(".")[0] for wait in mode.waits} == {"_local_scalar_dense", "index", "nonzero"}
    assert {name.split(" ")[0] for name in mode.unordered} == {"cumsum.default"}


def test_an_operation_without_a_fixed_order_ends_the_run_by_name() -> None:
    told = r"train\.deterministic: is true, and put_ knows no fixed order.*set it to false"
    with pytest.raises(InputError, match=told), fixed_order(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))  # on a CPU either
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_replica_is_loaded_on_its_device(rooms: Path, tmp_path: Path) -> None:
    """Not on the host first, which would hold a copy for each of its ranks."""

    class OnHost(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.bytes += out.nbytes if isinstance(out, torch.Tensor) and out.device.type == "cpu" else 0
            return out

    tree = settings(rooms, tmp_path, extra_teacher={"weights": "random", "placement": "replicate"})
    lesson = Lesson.of(parse_section(Config, tree, "x.yaml"))
    with OnHost() as host:
        teacher = build_teacher(lesson, Ranks(0, 0, 1, torch.device("meta")))
    assert {parameter.device.type for parameter in teacher.scorer.parameters()} == {"meta"}
    _, whole = teacher.parameter_bytes()
    assert host.bytes < whole / 10
