"""Attention losses over taps: against plain maps, and what is refused. Token groups of two tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lead_ds.data.tokens.alignment import token_groups
from lead_ds.errors import InputError
from lead_ds.losses import Attention, Scope, Side, TextTaps, Views, attention_loss, pair_taps
from lead_ds.relevance import ScoreFeatures


@dataclass
class Tap:
    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float
    causal: bool = False
    band: int | None = None


def views(teacher: tuple[Any, Any], student: tuple[Any, Any], layers: list[int]) -> Views:
    """Taps of (queries, passages) of both models, and which layers are compared."""
    final = ScoreFeatures(torch.zeros(1, 1, 1))
    return Views(Side(final, None, *student), Side(final, None, *teacher), Scope(1), compared=(layers, layers))


def tap(heads: int, width: int, length: int, *, seed: int, texts: int = 2, key_heads: int | None = None) -> Tap:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(texts, heads, length, width, generator=generator, dtype=torch.float64)
    k = torch.randn(texts, key_heads or heads, length, width, generator=generator, dtype=torch.float64)
    mask = torch.ones(texts, length, dtype=torch.long)
    mask[0, length - 1] = 0
    return Tap(q, k, mask, width**-0.5)


def maps(taps: Tap, scale: float) -> Tensor:
    assert taps.mask is not None
    logits = taps.q @ taps.k.repeat_interleave(taps.q.shape[1] // taps.k.shape[1], 1).mT * scale
    return logits.masked_fill(taps.mask[:, None, None] == 0, -1e30).softmax(-1)


def kl(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    teacher, student = (torch.where(teacher > 0, x, 1e-300) for x in (teacher, student))  # hidden keys
    rows = (teacher * (teacher / student).log()).sum(-1)
    return (rows * mask[:, None]).sum() / (mask.sum() * rows.shape[1])


def test_pair_heads_against_plain_maps() -> None:
    teacher, student = tap(2, 8, 5, seed=0), tap(2, 4, 5, seed=1)
    student.q.requires_grad_()
    value = attention_loss([TextTaps([teacher], [student])], Attention.set(weight=1, heads="pair"))
    expected = kl(maps(teacher, 8**-0.5), maps(student, 4**-0.5), teacher.mask)
    torch.testing.assert_close(value, expected)
    value.backward()
    plain = student.q.detach().clone().requires_grad_()
    kl(maps(teacher, 8**-0.5), maps(replace(student, q=plain), 4**-0.5), teacher.mask).backward()
    torch.testing.assert_close(student.q.grad, plain.grad)


def test_mean_heads_against_plain_maps() -> None:
    teacher, student = tap(4, 8, 5, seed=0, key_heads=2), tap(2, 4, 5, seed=1)
    value = attention_loss([TextTaps([teacher], [student])], Attention.set(weight=1, heads="mean"))
    averaged = [maps(x, x.scale).mean(1, keepdim=True) for x in (teacher, student)]
    torch.testing.assert_close(value, kl(*averaged, teacher.mask))


@pytest.mark.parametrize("relation_heads", [None, 4])
def test_relation_heads_against_plain_maps(relation_heads: int | None) -> None:
    """Heads are concatenated and re-split, with the new width's own scale."""
    teacher, student = tap(4, 8, 5, seed=0), tap(2, 4, 5, seed=1)
    config = Attention.set(weight=1, relation_heads=relation_heads)
    value = attention_loss([TextTaps([teacher], [student])], config)
    heads, resplit = relation_heads or 2, []
    for taps in (teacher, student):
        parts = [x.transpose(1, 2).reshape(2, 5, heads, -1).transpose(1, 2) for x in (taps.q, taps.k)]
        resplit.append(maps(replace(taps, q=parts[0], k=parts[1]), parts[0].shape[-1] ** -0.5))
    torch.testing.assert_close(value, kl(*resplit, teacher.mask))


def test_identical_models_give_zero_and_layers_and_texts_average() -> None:
    a, b = tap(2, 4, 5, seed=0), tap(2, 4, 5, seed=1)
    config = Attention.set(weight=1)
    assert attention_loss([TextTaps([a], [a])], config).item() == pytest.approx(0, abs=1e-12)
    one, two = (attention_loss([TextTaps([t], [s])], config) for t, s in ((a, b), (b, a)))
    torch.testing.assert_close(attention_loss([TextTaps([a, b], [b, a])], config), (one + two) / 2)
    torch.testing.assert_close(attention_loss([TextTaps([a], [b]), TextTaps([b], [a])], config), (one + two) / 2)


def parted(texts: TextTaps, rows: slice) -> TextTaps:
    """The taps of some of the texts, as another process would hold them."""

    def some(one: Tap) -> Tap:
        return replace(one, q=one.q[rows], k=one.k[rows], mask=None if one.mask is None else one.mask[rows])

    groups = [None if x is None else x[rows] for x in (texts.teacher_groups, texts.student_groups)]
    return TextTaps([some(x) for x in texts.teacher], [some(x) for x in texts.student], *groups)


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_count_by_their_rows(grouped: bool) -> None:
    """The mean over processes is the mean over all rows, value and gradient, though one holds more of them."""
    teacher, student = tap(2, 8, 6, seed=0, texts=3), tap(2, 8, 6, seed=1, texts=3)
    assert teacher.mask is not None
    teacher.mask[0, 2:] = 0
    student.q.requires_grad_()
    config = Attention.set(weight=1, heads="pair")
    groups = torch.tensor([[0, 0, 1, -1, -1, -1], [0, 1, 2, 3, 4, 5], [0, 1, 1, 2, 3, 4]])
    text = TextTaps([teacher], [student], *((groups, groups) if grouped else ()))
    whole = attention_loss([text], config)
    (expected,) = torch.autograd.grad(whole, student.q)

    parts = [parted(text, slice(0, 1)), parted(text, slice(1, 3))]
    counts: list[Tensor] = []
    for part in parts:
        attention_loss([part], config, mean_over=lambda rows: counts.append(rows) or rows)  # type: ignore[func-returns-value]
    assert counts[0] < counts[1]
    mean = torch.stack(counts).mean()
    losses = torch.stack([attention_loss([part], config, mean_over=lambda rows: mean) for part in parts])
    torch.testing.assert_close(losses.mean(), whole)
    (gradient,) = torch.autograd.grad(losses.mean(), student.q)
    torch.testing.assert_close(gradient, expected)
    unweighted = torch.stack([attention_loss([part], config) for part in parts]).mean()
    assert not torch.isclose(unweighted, whole), "the parts' own means do not do"


def test_causal_attention_and_windows_hide_keys_of_both() -> None:
    teacher, student = replace(tap(2, 4, 5, seed=0), causal=True), replace(tap(2, 4, 5, seed=1), band=1)
    value = attention_loss([TextTaps([teacher], [student])], Attention.set(weight=1))
    rows, keys = torch.arange(5)[:, None], torch.arange(5)[None]
    hidden = (keys > rows) | ((rows - keys).abs() > 1) | (teacher.mask[:, None, None] == 0)
    both = [(x.q @ x.k.mT * x.scale).masked_fill(hidden, -1e30).softmax(-1) for x in (teacher, student)]
    torch.testing.assert_close(value, kl(*both, teacher.mask))


def test_interaction_against_plain_maps() -> None:
    query, passage = tap(2, 4, 3, seed=0), tap(2, 4, 6, seed=1, texts=4)
    teacher = tap(2, 8, 3, seed=2), tap(2, 8, 6, seed=3, texts=4)
    texts = [TextTaps([teacher[0]], [query]), TextTaps([teacher[1]], [passage])]
    config = Attention.set(weight=1, form="interaction", divergence="mse", heads="pair")
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        for j in range(4):
            hidden = passage.mask[j] == 0
            t = (teacher[0].q[i] @ teacher[1].k[j].mT * 8**-0.5).masked_fill(hidden, -1e30).softmax(-1)
            s = (query.q[i] @ passage.k[j].mT * 4**-0.5).masked_fill(hidden, -1e30).softmax(-1)
            total += ((t - s).square().sum(-1) * query.mask[i]).sum() / 2
    torch.testing.assert_close(attention_loss(texts, config), total / 8)


def test_pairs_of_outputs() -> None:
    taps = {3: tap(2, 4, 5, seed=0), 5: tap(2, 4, 5, seed=1)}
    texts = pair_taps(views((None, taps), (None, taps), [5, 3]))
    assert len(texts) == 1
    assert texts[0].teacher == [taps[5], taps[3]]
    assert len(pair_taps(views((taps, taps), (taps, taps), [3]))) == 2
    with pytest.raises(InputError, match="different kinds of text"):
        pair_taps(views((taps, None), (None, taps), [3]))


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        ({"heads": "pair"}, (4, 8, 5), "teacher has 4, the student 2"),
        ({"relation_heads": 3}, (4, 8, 5), "3 heads do not divide the teacher's attention width 32"),
        ({}, (2, 4, 7), "tokenise differently"),
        ({"form": "interaction"}, (2, 4, 5), "reads? pairs"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    config: dict[str, Any], teacher: tuple[int, int, int], message: str
) -> None:
    texts = [TextTaps([tap(*teacher, seed=0)], [tap(2, 4, 5, seed=1)])]
    with pytest.raises(InputError, match=message):
        attention_loss(texts, Attention.set(weight=1, **config))


def test_the_teacher_gets_no_gradient() -> None:
    teacher, student = tap(2, 4, 5, seed=0), tap(2, 4, 5, seed=1)
    teacher.q.requires_grad_()
    student.q.requires_grad_()
    attention_loss([TextTaps([teacher], [student])], Attention.set(weight=1)).backward()
    assert teacher.q.grad is None
    assert student.q.grad is not None


def test_groups_of_two_tokenizers() -> None:
    text = "unhappy cats sleep"
    # [CLS] un ##happy cats sle ##ep [SEP]  against  un|happy| cats| sleep</s>
    teacher = [(0, 0), (0, 2), (2, 7), (8, 12), (13, 16), (16, 18), (0, 0)]
    student = [(0, 7), (7, 12), (12, 18), (0, 0)]
    t, s = token_groups(text, teacher, student)
    assert s == [1, 2, 3, 0]
    assert t == [-1, 1, 1, 2, 3, 3, 0]


def test_groups_end_where_either_text_is_cut() -> None:
    t, s = token_groups("ab cd ef", [(0, 2), (3, 5), (6, 8)], [(0, 1), (1, 2), (3, 5)])
    assert t == [0, 1, -1]
    assert s == [0, 0, 1]


def test_groups_skip_prompts_and_dropped_characters() -> None:
    # The teacher's text stands behind "q: "; the student drops the middle character.
    t, s = token_groups("axb", [(0, 2), (3, 4), (4, 5), (5, 6)], [(0, 1), (2, 3)], teacher_start=3)
    assert t == [-1, 0, -1, 1]
    assert s == [0, 1]


def test_grouped_attention_of_equal_tokens_is_the_plain_one() -> None:
    teacher, student = tap(4, 8, 5, seed=0), tap(2, 4, 5, seed=1)
    config = Attention.set(weight=1)
    groups = torch.arange(5).expand(2, 5).clone()
    groups[0, 4] = -1  # the padded token
    plain = attention_loss([TextTaps([teacher], [student])], config)
    torch.testing.assert_close(attention_loss([TextTaps([teacher], [student], groups, groups)], config), plain)


def test_splitting_a_teacher_token_moves_no_mass() -> None:
    """A key split in two of half its probability, with the same row, leaves the grouped divergence as it was."""
    teacher, student = tap(2, 4, 3, seed=0), tap(2, 4, 3, seed=1)
    groups = torch.arange(3).expand(2, 3)
    config = Attention.set(weight=1, heads="pair")
    whole = attention_loss([TextTaps([teacher], [student], groups, groups)], config)
    # One more key dimension adds log(1/2) to the logits of both halves, whatever the row.
    half = torch.zeros(2, 2, 4, 1, dtype=torch.float64)
    half[:, :, 2:] = -(2.0**0.5) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    order = [0, 1, 2, 2]
    one = torch.full((2, 2, 4, 1), 2.0**0.5, dtype=torch.float64)
    split = replace(
        teacher, q=torch.cat([teacher.q[:, :, order], one], -1), k=torch.cat([teacher.k[:, :, order], half], -1)
    )
    parts = torch.tensor(order).expand(2, 4)
    moved = attention_loss([TextTaps([split], [student], parts, groups)], config)
    torch.testing.assert_close(moved, whole)
