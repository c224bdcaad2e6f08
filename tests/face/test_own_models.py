"""A torch module of a researcher's own as student, and as teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from lead_ds import Callback, Distiller, Searcher, load
from lead_ds.errors import InputError
from tests.face.own_models import Bare, Words
from tests.face.test_distiller import losses_of

Make = Callable[..., Distiller]
TEXTS = ["the glacier is this", "violin"]


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in module.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_student_of_ones_own(distiller: Make, rooms: Path, tmp_path: Path) -> None:
    module = Words()
    before = weights(module)
    run = distiller(student=module, evaluation={"path": str(rooms / "data"), "queries": 4}, evaluate_every=2, steps=4)
    run.train(quiet=True)
    assert same(weights(module), before)  # a copy was trained
    assert all(set(row["parts"]) >= {"contrastive", "response"} for row in run.metrics if "loss" in row)
    assert [row["step"] for row in run.metrics if "evaluation" in row] == [2, 4]

    student = run.student
    assert student.num_layers == 4
    assert not same(weights(module), before)  # and its weights are the module's now
    again = Words(seed=5)
    load_model(again, str(run.save(tmp_path / "saved") / "model.safetensors"))
    assert same(weights(again), weights(module))
    with torch.no_grad():
        expected = {side: module(module.tokenize(TEXTS, side))[0] for side in ("passages", "queries")}
    for side, vectors in expected.items():
        assert torch.allclose(student.encode(TEXTS, side), vectors, atol=1e-6)
    assert not torch.allclose(expected["passages"], expected["queries"])
    assert student.layers("which glacier", TEXTS).shape == (5, 2)
    assert len(Searcher(student, TEXTS).search("which glacier")) == 2
    assert 0 <= run.evaluate(rooms / "data", "dev")["nDCG@10"] <= 1
    taught = distiller("taught", teacher=student, losses={"response": {}}).train(quiet=True)
    assert len(losses_of(taught)) == 3


def test_it_is_the_same_run_stopped_and_resumed(distiller: Make) -> None:
    class Stop(Callback):
        def on_step(self, metrics: dict[str, Any]) -> bool:
            return metrics["step"] == 2

    whole = distiller("whole", student=Words(), steps=4).train(quiet=True)
    part = distiller("part", student=Words(), steps=4, callbacks=[Stop()]).train(quiet=True)
    assert len(losses_of(part)) == 2
    resumed = distiller("part", student=Words(seed=9), steps=4).train(resume=True, quiet=True)
    assert losses_of(resumed) == losses_of(whole)
    assert torch.equal(resumed.student.encode(TEXTS), whole.student.encode(TEXTS))

    distiller("taught", teacher=Words(seed=1), callbacks=[Stop()], steps=4).train(quiet=True)
    with pytest.raises(InputError, match="teacher: weights"):
        distiller("taught", teacher=Words(seed=2), steps=4).train(resume=True, quiet=True)
    assert len(losses_of(distiller("taught", teacher=Words(seed=1), steps=4).train(resume=True, quiet=True))) == 4


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_under_every_stage(distiller: Make, stage: int) -> None:
    expected = losses_of(distiller("one", student=Words()).train(quiet=True))
    files = {"student": f"ds_configs/student_zero{stage}.json"}
    run = distiller("other", student=Words(), deepspeed=files).train(quiet=True)
    assert losses_of(run) == pytest.approx(expected, rel=1e-5)
    assert run.student.encode(TEXTS).shape == (2, 8)


def test_a_teacher_of_ones_own(distiller: Make) -> None:
    teacher, student = Words(seed=1, width=6, layers=2), Words()
    before, grads = weights(teacher), [p.requires_grad for p in teacher.parameters()]
    run = distiller(teacher={"module": teacher, "scale": "cosine"}, student=student, workers=1).train(quiet=True)
    assert same(weights(teacher), before)
    assert [p.requires_grad for p in teacher.parameters()] == grads
    # Its relevance is compared over every passage of the batch, as that of any dual encoder.
    row = next(row for row in run.metrics if "loss" in row)
    assert row["layers"]["teacher"]
    with_student_of_a_kind = distiller("kind", teacher=teacher).train(quiet=True)
    assert len(losses_of(with_student_of_a_kind)) == 3


def test_one_without_layers_learns_by_what_needs_none(distiller: Make) -> None:
    run = distiller(student=Bare(), teacher=Bare(seed=2), losses={"response": {}, "contrastive": {}}).train(quiet=True)
    assert run.student.num_layers == 0
    assert run.student.layers("thing", TEXTS).shape == (1, 2)
    with pytest.raises(InputError, match=r"losses\.layer"):
        distiller("layers", student=Bare()).train(quiet=True)


class NoTokens(nn.Linear):
    """Reads no texts."""


class NoRows(Words):
    def tokenize(self, texts: Any, side: str) -> Any:
        return {"ids": torch.zeros(1, 3)}


class NoVectors(Words):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens)[0].sum()


class Locked(Words):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle a lock")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"student": NoTokens(2, 2)}, "NoTokens: has no tokenize"),
        ({"student": NoRows()}, "tokenize gives no dictionary of tensors with a row for each text"),
        ({"student": NoVectors()}, "forward gives something else than vectors"),
        ({"student": Locked()}, "Locked: cannot be copied: TypeError: cannot pickle a lock"),
        ({"student": {"module": Words(), "pooling": "mean"}}, "student.pooling: is ignored by a module of your own"),
        ({"student": Words(), "train": {"grad_cache": 2}}, "train.grad_cache: needs models of a kind"),
        ({"student": Words(), "token_cache": True}, "data.token_cache: needs models of a kind"),
        ({"student": Words(), "losses": {"attention": {}}}, "losses.attention.weight: needs models of a kind"),
        ({"student": Words(), "train": {"gradient_checkpointing": True}}, "Words has no gradient_checkpointing_enable"),
    ],
)
def test_what_cannot_be_is_refused(distiller: Make, tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        distiller(**change).train(quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_saved_module_says_what_it_is(distiller: Make) -> None:
    run = distiller(student=copy.deepcopy(Words())).train(quiet=True)
    assert "load_model(model" in (run.folder / "README.md").read_text()
    with pytest.raises(InputError, match=r"a module is none of .*see its README\.md"):
        load(run.folder)
    with pytest.raises(InputError, match=r"a dual is none of .*choose one of these"):
        load(run.config.teacher.path, kind="dual")  # type: ignore[union-attr]
