"""Texts packed into rows say what each says alone, whatever stands beside them; models that cannot do so are refused."""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

from lead_ds.config import Config, StudentConfig, TeacherConfig
from lead_ds.data.reads import ModelBatch, pack
from lead_ds.data.tokens.passes import packed
from lead_ds.errors import InputError
from lead_ds.models.load import load_student, load_teacher, load_text
from lead_ds.models.packing_check import check_packing
from lead_ds.models.scorer import Scorer
from tests.helpers.rooms import TEACHERS
from tests.models.test_passes import PASSAGES, QUERIES, opened, tensors
from tests.models.tiny_models import FAMILIES, tiny_model, tokens_of

LENGTHS = (3, 17, 9, 1, 30, 12, 2, 2, 24, 7)
STRANGERS = ("mpnet", "deberta-v2", "modernbert")


def says(scorer: Scorer, tokens: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return scorer(tokens=tokens, layers=[0, 1, 2])


@pytest.mark.parametrize("lengths", [LENGTHS, (5,), (4, 4), (1,) * 40, (0, 3), tuple(range(1, 60))])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_hold_every_token_and_little_else(lengths: tuple[int, ...], side: str) -> None:
    texts = tokens_of(lengths, side=side)
    [tokens] = packed([texts], pad=0).tokens
    rows, places, mask = tokens["input_ids"], tokens["places"], tokens["attention_mask"].bool()
    for text, place, real in zip(texts["input_ids"], places, mask, strict=True):
        read = rows.flatten()[place][real]
        assert torch.equal(read, text[text > 0] if text.any() else torch.tensor([0]))
        assert torch.equal(tokens["position_ids"].flatten()[place][real], torch.arange(len(read)))
        assert len({int(x) // rows.shape[1] for x in place}) == 1, "a text stands in one row"
    assert int(mask.sum()) == len(set(places[mask].tolist())), "no place holds two tokens"
    bounds = tokens["bounds"]
    assert torch.equal(bounds[:-1].long(), (tokens["position_ids"].flatten() == 0).nonzero()[:, 0])
    assert int(bounds[-1]) == rows.numel()
    assert int(bounds.diff().max()) <= places.shape[1], "the longest that attention is told of"
    if len(lengths) > 50:
        assert rows.numel() < 1.02 * int(mask.sum())
        assert len(rows) > 1


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in STRANGERS])
def test_texts_say_what_they_say_alone(tmp_path: Path, family: str) -> None:
    path, texts = tiny_model(tmp_path, family), tokens_of(LENGTHS)
    if "roberta" in family:
        texts["input_ids"][texts["attention_mask"] == 0] = 1
    changed = {**texts, "input_ids": texts["input_ids"].clone()}
    changed["input_ids"][4, :30] = torch.arange(40, 70)
    [rows], [beside] = (packed([t], pad=1 if "roberta" in family else 0).tokens for t in (texts, changed))
    others = torch.arange(len(LENGTHS)) != 4
    for attention in ("sdpa", "eager") if family != "gemma2" else ("eager",):
        for pooling in ("last", "mean"):
            settings: dict[str, Any] = {"path": path, "pooling": pooling, "attention": attention}
            scorer = load_teacher(TeacherConfig(kind="dual_encoder", **settings), torch.float32)
            said = says(scorer, rows)
            torch.testing.assert_close(said, says(scorer, texts), rtol=1e-5, atol=1e-5)
            moved = says(scorer, beside)
            torch.testing.assert_close(moved[:, others], said[:, others], rtol=0, atol=1e-6)
            assert (moved[:, 4] - said[:, 4]).abs().max() > 0.1
            check_packing(scorer, scorer.all_layers, "teacher.passes")


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
    """flash-attn's varlen function in plain torch: q, k, v [tokens, heads, width], texts cut at the bounds."""
    assert max(b - a for a, b in pairwise(told["cu_seqlens_q"].tolist())) <= told["max_seqlen_q"]
    assert torch.equal(told["cu_seqlens_q"], told["cu_seqlens_k"])
    assert told["cu_seqlens_q"].dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    left, right = told.get("window_size", (-1, -1))
    out = torch.empty_like(q)
    for first, last in pairwise(told["cu_seqlens_q"].tolist()):
        back = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (back >= 0) | torch.tensor(not told["causal"])
        seen &= (back <= left) | torch.tensor(left < 0)
        seen &= (back >= -right) | torch.tensor(right < 0)
        part = (x[first:last].transpose(0, 1) for x in (q, k, v))
        said = torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=seen, scale=told["softmax_scale"])
        out[first:last] = said.transpose(0, 1)
    return out


def flash_dense(q: Tensor, k: Tensor, v: Tensor, **told: Any) -> Tensor:
    """flash-attn's function of texts of equal length [texts, tokens, heads, width]."""
    bounds = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    more = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": q.shape[1]}
    return flash_varlen(*(x.flatten(0, 1) for x in (q, k, v)), **more, **told).unflatten(0, q.shape[:2])


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "bert", "xlm-roberta"])
def test_flash_attention_reads_texts_and_packed_rows(
    tmp_path: Path, family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own way to it, sliding windows and padding among it, but for the functions that need a GPU."""
    supported = dict.fromkeys(inspect.signature(flash_utils._process_flash_attention_kwargs).parameters, False)
    supported |= dict.fromkeys(("window_size", "max_seqlen_q", "deterministic"), True)
    functions = (flash_dense, flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    process = partial(flash_utils._process_flash_attention_kwargs, supports_mapping=defaultdict(bool, supported))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda name: (functions, (process, None)))
    path, texts = tiny_model(tmp_path, family), tokens_of(LENGTHS + LENGTHS[::-1])
    if "roberta" in family:
        texts["input_ids"][texts["attention_mask"] == 0] = 1
    scorer = load_teacher(TeacherConfig(kind="dual_encoder", path=path), torch.float32)
    alone = says(scorer, texts)
    scorer.backbone.config._attn_implementation = attention
    torch.testing.assert_close(says(scorer, texts), alone, rtol=1e-5, atol=1e-5)
    [rows] = packed([texts], pad=0).tokens
    assert len(rows["input_ids"]) > 1
    torch.testing.assert_close(says(scorer, rows), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*STRANGERS, "bidirectional"])
def test_models_that_mix_a_row_are_refused(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    sees_ahead = {"is_causal": False} if family == "bidirectional" else {}
    path = tiny_model(tmp_path, "llama" if sees_ahead else family, **sees_ahead)
    scorer = load_teacher(TeacherConfig(kind="dual_encoder", path=path), dtype)
    told = "lets texts in one row see each other" if sees_ahead else "is not known to read several texts in a row"
    with pytest.raises(InputError, match=told) as error:
        check_packing(scorer, scorer.all_layers, "teacher.passes")
    assert str(error.value).startswith("teacher.passes: ")


def test_half_precision_is_no_reason_to_refuse(tmp_path: Path) -> None:
    for family, kind, head in (("llama", "llm_reranker", "causal"), ("bert", "cross_encoder", "classifier")):
        path = tiny_model(tmp_path / family, family, head)
        answers = {"yes_token": "y", "no_token": "n"} if kind == "llm_reranker" else {}
        config = TeacherConfig.model_validate({"kind": kind, "path": path, **answers})
        scorer = load_teacher(config, torch.bfloat16)
        check_packing(scorer, scorer.all_layers, "teacher.passes")


@pytest.mark.parametrize("kind", [kind for kind in TEACHERS if kind != "colbert"])
def test_relevance_is_the_same(rooms: Path, kind: str) -> None:
    teacher, encoder, batch = opened(rooms, kind)
    with torch.no_grad():
        plain, found = (teacher(b, layers=list(range(teacher.num_layers))) for b in (batch, pack(batch, encoder)))
    for name in ("final", "layers"):
        for a, b in zip(tensors(getattr(plain, name)), tensors(getattr(found, name)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        one, other = (getattr(x, name).group_relevance(3).logits for x in (plain, found))
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_students_gradient_is_the_same(rooms: Path) -> None:
    config = StudentConfig(path=str(rooms / "student"), pooling="mean", normalize=True)
    encoder, gradients = load_text(config), []
    plain = ModelBatch(3, queries=encoder.queries(QUERIES), passages=encoder.passages(PASSAGES))
    for batch in (plain, pack(plain, encoder)):
        student = load_student(config, torch.float32)
        student(batch, layers=[0, 2]).layers.relevance().logits.square().sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-6


def test_what_cannot_be_packed_is_refused() -> None:
    tree: dict[str, Any] = {
        "student": {"path": "-"},
        "data": {"path": "-"},
        "teacher": {"kind": "colbert", "path": "-", "passes": "packed"},
    }
    with pytest.raises(ValueError, match="packed keeps one state of a text"):
        Config.model_validate(tree)
    tree |= {"teacher": {"kind": "dual_encoder", "path": "-"}, "student": {"path": "-", "passes": "packed"}}
    with pytest.raises(ValueError, match=r"train\.grad_cache makes passes of its own"):
        Config.model_validate(tree | {"train": {"grad_cache": 2}})
    with pytest.raises(ValueError, match=r"student\.passes\s+has no attention maps"):
        Config.model_validate(tree | {"losses": {"attention": {"weight": 1.0}}})
    Config.model_validate(tree | {"teacher": {"kind": "dual_encoder", "path": "-", "passes": "packed"}})
