"""A teacher that runs ahead, or is compiled, or has its attention chosen by measurement, says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import Config, TeacherConfig, load_config
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training import numerics
from lead_ds.engine.training.ahead import with_next
from lead_ds.engine.training.numerics import fit_attention
from lead_ds.engine.training.trainee import Trainee, student_dtype
from lead_ds.models import attention_backend
from lead_ds.models.attention_backend import candidates, choose_attention
from lead_ds.models.load import load_student, load_teacher
from tests.helpers.batches import windows_of
from tests.helpers.launch import launch
from tests.models.zero3_jobs import tokens_of

HERE = Ranks(0, 0, 1, torch.device("cpu"))


def test_two_ranks_lose_nothing_to_overlap_passes_rows_or_kept_tokens(
    configure: Callable[..., Path], tmp_path: Path
) -> None:
    # Dropout in the student and layers drawn anew: whatever ran out of turn would show.
    dropout: dict[str, Any] = {"student": {"path": "dropout"}, "extra_teacher": {"placement": "replicate"}}
    train = {"batch_size": 2, "accumulation": 2}
    overlap = [configure(f"overlap-{on}", train=train | {"overlap": on}, **dropout) for on in (False, True)]
    # A sharded ColBERT: its queries and passages in one forward, and in two sorted ones; the student's alike.
    passes = [
        configure(
            f"passes-{teacher}",
            "colbert",
            extra_teacher={"placement": "zero3", "passes": teacher},
            student={"passes": student},
            train=train,
        )
        for teacher, student in ((None, None), (1, None), (2, 2), ("auto", "auto"))
    ]
    # A sharded decoder whose texts stand in rows, another number of them on each rank; the student's alike.
    few: dict[str, Any] = {"train": {"batch_size": 5}, "data": {"negatives": 1}}
    rows = [
        configure(f"rows-{n}", extra_teacher={"placement": "zero3", "passes": n}, student={"passes": n}, **few)
        for n in (None, "packed")
    ]
    shapes = [packed_shapes(rows[1], rank) for rank in range(2)]
    assert any(one[0] != other[0] for one, other in zip(*shapes, strict=True)), "ranks have other numbers of rows"
    kept = configure("kept", train=train, **dropout, data={"token_cache": str(tmp_path / "tokens")})
    refused = configure("sharded", train=train | {"overlap": True}, extra_teacher={"placement": "zero3"})
    paths = [*overlap, *passes, *rows, kept, refused]
    for results in launch("tests.engine.jobs:distil_each", 2, configs=[str(path) for path in paths]):
        plain, ahead, unsorted, one, two, auto, texts, packed, tokens, told = results
        assert len(set(plain)) == 6
        assert ahead == plain
        assert tokens == plain
        assert one == pytest.approx(unsorted, rel=1e-5)
        assert two == pytest.approx(unsorted, rel=1e-5)
        assert auto == pytest.approx(unsorted, rel=1e-5)
        assert packed == pytest.approx(texts, rel=1e-5)
        assert "train.overlap" in told
        assert "teacher.placement=replicate" in told


def packed_shapes(path: Path, rank: int) -> list[tuple[int, ...]]:
    """Rows, and tokens of a row, of the teacher's windows on one of two ranks."""
    config = load_config(path)
    assert config.teacher is not None
    batches = windows_of(config, Ranks(rank, rank, 2, torch.device("cpu")))
    passes = [batches.window(step).teachers[0][0].passes for step in range(config.train.steps)]
    return [tuple(one.tokens[0]["input_ids"].shape) for one in passes if one is not None]


def test_each_with_the_next() -> None:
    assert list(with_next(iter("abc"))) == [("a", "b"), ("b", "c"), ("c", None)]
    assert list(with_next(iter(""))) == []


def tree(**sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "student": {"path": "-"},
        "data": {"path": "-"},
        "teacher": {"kind": "dual_encoder", "path": "-"},
    }
    return {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}


def test_what_cannot_be_together_is_refused() -> None:
    with pytest.raises(ValueError, match="compile needs placement: replicate"):
        Config.model_validate(tree(teacher={"compile": True, "placement": "zero3"}))
    with pytest.raises(ValueError, match=r"train\.overlap\s+has no attention maps"):
        Config.model_validate(tree(train={"overlap": True}, losses={"attention": {"weight": 1.0}}))


def test_the_faster_attention_is_taken(rooms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TeacherConfig(kind="dual_encoder", path=str(rooms / "bert"))
    teacher, tokens = load_teacher(config, torch.float32), tokens_of((9, 4))
    assert candidates(config, torch.float32, HERE.device) == [], "a CPU has no choice"
    said = teacher(tokens=tokens)

    spent = 0.0
    monkeypatch.setattr(attention_backend.time, "perf_counter", lambda: spent)

    def slow_if(backend: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal spent
            teacher(tokens=tokens)
            spent += 2.0 if teacher.backbone.config._attn_implementation == backend else 1.0

        return run

    for slow, fast in (("sdpa", "eager"), ("eager", "sdpa")):
        seconds = choose_attention(teacher, ["sdpa", "eager", "flash_attention_2"], slow_if(slow), HERE)
        assert seconds == {slow: 2.0, fast: 1.0}, "what the machine lacks is passed over"
        assert teacher.backbone.config._attn_implementation == fast
        torch.testing.assert_close(teacher(tokens=tokens), said, rtol=1e-5, atol=1e-6)
    # On resuming it is as it was, measured or not.
    assert choose_attention(teacher, ["sdpa", "eager"], slow_if("eager"), HERE, known="eager") == {}
    assert teacher.backbone.config._attn_implementation == "eager"


def test_a_bf16_student_of_short_rows_has_eager_attention_on_a_cpu(
    configure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(known: str | None = None, **student: Any) -> str:
        config = load_config(configure(student=student))
        dtype = student_dtype(config.student, HERE.device)
        trainee = Trainee(load_student(config.student, dtype))
        fit_attention(trainee, config.student, windows_of(config, HERE), dtype, HERE, known)
        return str(trainee.student.backbone.config._attn_implementation)

    assert chosen() == "sdpa"
    assert chosen(dtype="bf16") == "eager"
    assert chosen(dtype="bf16", attention="sdpa") == "sdpa"
    assert chosen(dtype="bf16", known="sdpa") == "sdpa", "as the run was before it was interrupted"
    monkeypatch.setattr(numerics, "SHORT_ROW", 4)
    assert chosen(dtype="bf16") == "sdpa", "its rows are longer"


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same(configure: Callable[..., Path]) -> None:
    paths = [
        configure(f"compile-{on}", extra_teacher={"placement": "replicate", "compile": on}) for on in (False, True)
    ]
    [results] = launch("tests.engine.jobs:distil_each", 1, timeout=900, configs=[str(path) for path in paths])
    assert results[1] == pytest.approx(results[0], rel=1e-5)
