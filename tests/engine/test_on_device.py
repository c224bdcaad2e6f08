"""Steps on a device that has no values: whatever mixes it with the host fails, and whatever would wait for a GPU is seen."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from lead_ds.config import Config
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.records.phases import Phases
from lead_ds.engine.training import loop
from lead_ds.engine.training.ahead import answers
from lead_ds.engine.training.distill import open_inputs, settled
from lead_ds.engine.training.loop import Training
from lead_ds.engine.training.objective import build_objective
from lead_ds.engine.training.step import word_groups
from lead_ds.engine.training.trainee import Trainee
from lead_ds.errors import InputError
from lead_ds.kernels.layer_kl import inputs
from lead_ds.losses.divergence import relevance_kl
from lead_ds.losses.mixture import mixture
from lead_ds.models.load import load_student
from lead_ds.relevance import VectorFeatures
from lead_ds.settings.parse import parse_section
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teacher import Lesson
from tests.formats.format import pool, saved, unit
from tests.formats.vectors import PROMPTS
from tests.helpers.rooms import settings
from tests.models.tiny_models import tiny_model

META = torch.device("meta")
# What asks a tensor for a value, and what is answered where it has none.
ASKED: dict[str, Any] = {"__bool__": False, "__int__": 1, "__float__": 1.0, "__index__": 1, "item": 1.0, "tolist": [1]}
# transformers asks whether a batch has padding, and loads a model; a branch that a GPU does not take.
OTHERS = (
    "/transformers/masking_utils.py",
    "/transformers/modeling_utils.py",
    "/lead_ds/kernels/attention_kl/chunked.py",
)
ALONE = {"path": "bert", "scale": "none"}
BOTH_PACKED = {"student": {"passes": "packed"}, "extra_teacher": {"passes": "packed"}}
RUNS: dict[str, dict[str, Any]] = {
    "dual_encoder": {},
    "fp16": {"dtype": "fp16"},
    "vectors": {
        "losses": {name: {"weight": 1.0} for name in ("similarity", "spread", "order", "margin_mse", "embedding")}
    },
    "mean pooling": {"student": {"pooling": "mean"}},
    "standard": {"extra_teacher": {"scale": "standard"}},
    "cosine": {"extra_teacher": {"scale": "cosine"}, "student": {"scale": "cosine"}},
    "attention": {"losses": {"attention": {"weight": 1.0}}, "extra_teacher": ALONE},
    "heads: mean": {"losses": {"attention": {"weight": 1.0, "heads": "mean"}}, "extra_teacher": ALONE},
    "interaction": {"losses": {"attention": {"weight": 1.0, "form": "interaction"}}, "extra_teacher": ALONE},
    "words": {"losses": {"attention": {"weight": 1.0}}},
    "packed": BOTH_PACKED,
    "passes": {"student": {"passes": 2}, "extra_teacher": {"passes": 2}},
    "colbert": {"teacher": "colbert", "student": {"kind": "colbert"}},
    "cross_encoder": {
        "teacher": "cross_encoder",
        "student": {"kind": "cross_encoder", "path": "cross", "max_length": 64},
    },
    "cross_encoder to dual_encoder": {"teacher": "cross_encoder"},
    "llm_reranker": {"teacher": "llm_reranker"},
    "widths": {"student": {"dims": [8, 16]}},
    "focal": {"losses": {"focal": {"weight": 1.0}}},
    "duplicates": {"data": {"mask_duplicates": True}},
    "grad_cache": {"train": {"grad_cache": 1}},
}


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Where values of tensors on META were asked for, or made of the host's, by files that are neither torch's nor a test's.

    To copy numbers to a GPU waits for it, unless they lie in pinned memory and the copy is told not to wait.
    """
    found: set[str] = set()

    def note(name: str) -> None:
        frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        if frames[-1].name != "stepped":  # which puts the models there
            found.add(f"{name} in {frames[-1].filename}:{frames[-1].lineno}")

    def watch(name: str, answer: Any, original: Any) -> Any:
        def ask(self: Tensor, *given: Any) -> Any:
            if self.device != META:
                return original(self, *given)
            note(name)
            return answer

        return ask

    def copies(name: str, original: Any) -> Any:
        def copy(first: Any, *given: Any, **how: Any) -> Any:
            made = original(first, *given, **how)
            on_host = not isinstance(first, Tensor) or first.device != META
            if made.device == META and (on_host or name == "new_tensor") and not how.get("non_blocking"):
                note(name)
            return made

        return copy

    _device_constructors()  # once and for all, of torch's own functions
    with monkeypatch.context() as patch:
        for name, answer in ASKED.items():
            patch.setattr(Tensor, name, watch(name, answer, getattr(Tensor, name)))
        for of, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "to"), (Tensor, "new_tensor")):
            patch.setattr(of, name, copies(name, getattr(of, name)))
        yield found


def stepped(how: dict[str, Any], rooms: Path, out: Path) -> Tensor:
    """The loss of two steps on META of a run, the last one's gradient taken."""
    how = dict(how)
    dtype = how.pop("dtype", "bf16")
    teacher = {"dtype": dtype, "placement": "replicate", **how.pop("extra_teacher", {})}
    student = {"dtype": dtype, "normalize": False, **how.pop("student", {})}
    kind = how.pop("teacher", "dual_encoder")
    tree = settings(rooms, out, kind, extra_teacher=teacher, student=student, **how)
    config = settled(parse_section(Config, tree, "x.yaml"))
    host, there = (Ranks(0, 0, 1, device) for device in (torch.device("cpu"), META))
    _, _, batches, _ = open_inputs(config, host)
    scorer = load_student(config.student, getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype]))
    frozen = build_teacher(Lesson.of(config), host)
    trainee = Trainee(scorer)
    trainee.losses = build_objective(config, scorer, [frozen], batches, host)
    window = batches.window(0)
    trainee.to(META)
    frozen.scorer.to(META)
    frozen.device = META
    books: Any = SimpleNamespace(
        checkpoints=None, recorder=None, watchdog=SimpleNamespace(at=lambda *a: None), phases=Phases()
    )
    engine = SimpleNamespace(module=trainee)
    training = Training(
        config=config,
        ranks=there,
        engine=engine,
        teachers={"teacher": frozen},
        batches=batches,
        evaluator=None,
        books=books,
        state={},
    )
    for _ in range(2):
        wanted = training._asked(0)
        views = answers(training.teachers, window, wanted)
        output = trainee(training.micro(window, 0, wanted, views))
        assert {part.device for part in output.parts.values()} == {META}
        output.loss.backward()
    return output.loss


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_a_gpu(name: str, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with asked(monkeypatch) as found:
        loss = stepped(RUNS[name], rooms, tmp_path / "run")
    assert loss.device == META
    assert not [where for where in found if not any(other in where for other in OTHERS)]


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_a_prompt_that_pooling_leaves_out_is_not_counted_there(
    mode: str, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "prompted", "bert", pool(mode, include_prompt=False), unit(), **PROMPTS)
    with asked(monkeypatch) as found:
        stepped({"student": {"path": path}}, rooms, tmp_path / "run")
    assert not [where for where in found if not any(other in where for other in OTHERS)]


def test_a_sparse_student_waits_for_nothing(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {name: {"weight": 1.0} for name in ("contrastive", "response", "flops")} | {"layer": {"weight": 0.0}}
    student = {"kind": "sparse", "path": tiny_model(tmp_path / "masked", "bert", "masked", layers=2)}
    with asked(monkeypatch) as found:
        stepped({"student": student, "losses": losses}, rooms, tmp_path / "run")
    assert not [where for where in found if not any(other in where for other in OTHERS)]


@pytest.mark.parametrize("scale", ["none", "cosine", "standard"])
def test_relevance_whose_map_is_not_held_waits_for_nothing(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_STORED_SCORES", 0)
    mask = torch.ones(4, 12, dtype=torch.bool, device=META)
    target = torch.zeros(4, dtype=torch.int64, device=META)

    def side() -> VectorFeatures:
        return VectorFeatures(*(torch.ones(2, n, 16, device=META, requires_grad=True) for n in (4, 12)), scale=scale)

    with asked(monkeypatch) as found:
        kl, _ = relevance_kl(side().detach().relevance(mask), side().relevance(mask), target)
        kl.sum().backward()
        assert mixture([side().relevance(mask)] * 2, [0.25, 0.75], target).logits.device == META
    assert not found


def test_the_watch_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, device=META)
    with asked(monkeypatch) as found:
        assert not bool(x[0])
        int(x[0])
        x.tolist()
        x[0].item()
        assert torch.ones(1).item() == 1.0
        x.new_tensor([1.0]), torch.tensor([1.0], device=META), torch.ones(1).to(META)
        x.to(torch.float16), torch.tensor([1.0]), torch.ones(1).to(META, non_blocking=True)
    names = [one.split(" ")[0] for one in found]
    assert sorted(names) == sorted(["__bool__", "__int__", "tolist", "item", "new_tensor", "tensor", "to"])
    with pytest.raises(NotImplementedError):
        x.cpu()
    with pytest.raises(RuntimeError):
        x + torch.ones(2)


def test_the_watch_sees_word_groups_that_are_counted_on_the_device(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited until they were counted on the host."""

    def uncounted(*given: Any) -> tuple[Any, ...]:
        return tuple(groups and groups._replace(slots=None) for groups in word_groups(*given))

    monkeypatch.setattr(loop, "word_groups", uncounted)
    with asked(monkeypatch) as found:
        stepped(RUNS["words"], rooms, tmp_path / "run")
    assert any("grouped/op.py" in where for where in found)


def test_a_default_device_is_refused() -> None:
    with torch.device("meta"), pytest.raises(InputError, match=r"torch\.set_default_device: is set"), ranks():
        pass
