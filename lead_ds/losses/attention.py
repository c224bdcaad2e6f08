"""Attention distributions of selected layers: of each text over itself, or of queries over passages.

Dimensions: K layer pairs, B texts, H heads, L tokens, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lead_ds.errors import InputError
from lead_ds.kernels import attention_kl, grouped_attention_kl, interaction_attention
from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.selection import selecting
from lead_ds.losses.views import Tap, Views
from lead_ds.relevance import Impl
from lead_ds.settings.base import Positive, Temperature
from lead_ds.settings.modes import refusal

WHERE = "losses.attention"


class AttentionSettings(LossSettings):
    """Attention-distribution KL (or MSE) between selected layers."""

    form: Literal["self", "interaction"] = Field(
        "self", description="self: attention maps of each text; interaction: query tokens over passage tokens"
    )
    divergence: Literal["kl", "mse"] = Field("kl", description="mse: interaction form only")
    heads: Literal["relation", "mean", "pair"] = Field(
        "relation",
        description="relation: MiniLMv2 relation heads; mean: maps averaged over heads; pair: one to one",
    )
    relation_heads: Positive | None = Field(None, description="heads: relation; null: the student's number of heads")
    temperature: Temperature = 1.0

    @model_validator(mode="after")
    def _check(self) -> AttentionSettings:
        if self.divergence == "mse" and self.form != "interaction":
            what, remedy = "mse needs form: interaction", "use kl, or set form: interaction"
            raise refusal("attention", "divergence", self.divergence, what, remedy)
        if self.form == "interaction" and self.heads == "mean":
            what, remedy = "mean does not go with form: interaction", "use heads: relation, or pair"
            raise refusal("attention", "heads", self.heads, what, remedy)
        if self.relation_heads is not None and self.heads != "relation":
            what, remedy = f"is ignored by heads: {self.heads}", "take it out, or set heads: relation"
            raise refusal("attention", "relation_heads", self.relation_heads, what, remedy)
        return self


@dataclass(frozen=True)
class TextTaps:
    """Taps of both models on the same texts, layer pair by layer pair.

    teacher_groups [B, Lt], student_groups [B, Ls] (int64, -1: none; see `data.tokens.alignment`) where tokenizers differ;
    None where they are the same. slots: more than the largest of their numbers.
    """

    teacher: Sequence[Tap]
    student: Sequence[Tap]
    teacher_groups: Tensor | None = None
    student_groups: Tensor | None = None
    slots: int | None = None


def attention_loss(
    texts: Sequence[TextTaps],
    config: AttentionSettings,
    *,
    impl: Impl = "auto",
    mean_over: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Tensor:
    """Divergence of the student's attention from the teacher's; gradient to the student only. A float32 scalar.

    texts: queries and passages, in this order. Form `self`: KL(teacher || student) over keys in nats, mean over real
    query rows, heads and layer pairs, then over the kinds of text (MiniLMv2, arXiv 2012.15828, where heads are
    re-split). Form `interaction`: query tokens over passage tokens, every query against every passage of the
    micro-batch, KL or squared error (VIRT, arXiv 2112.04195).

    mean_over: the mean of a number over the processes that share a step. In form `self` a process counts by its share of
    the rows, so that the mean of their losses is that over all rows, however many processes hold them. In form
    `interaction` it is over the pairs of each process, and another number of processes compares other pairs.
    Raises InputError where the models' tokenizers or heads cannot be compared as configured.
    """
    if config.form == "interaction":
        return _interaction(texts, config, impl)
    found = []
    for text in texts:
        value, rows = _self_attention(text, config, impl), _rows(text)
        found.append(value * (rows / mean_over(rows).clamp_min(1)))
    return torch.stack(found).mean()


def pair_taps(views: Views) -> list[TextTaps]:
    """The taps of both models in the layers that are compared: of queries, then of passages.

    Raises InputError where the models read different kinds of text.
    """
    teacher, student, pairs = views.teacher, views.student, []
    assert teacher is not None
    for t, s, groups in (
        (teacher.taps_queries, student.taps_queries, views.groups[0]),
        (teacher.taps_passages, student.taps_passages, views.groups[1]),
    ):
        # A model that reads pairs has no taps of queries: its maps are of other texts than a dual encoder's.
        if t and s and bool(teacher.taps_queries) == bool(student.taps_queries):
            of_teacher, of_student = ([taps[i] for i in at] for taps, at in zip((t, s), views.compared, strict=True))
            pairs.append(TextTaps(of_teacher, of_student, *(groups or ())))
    if not pairs:
        raise InputError(
            WHERE, "the models read different kinds of text", "compare models of one kind, or set weight: 0"
        )
    return pairs


@register
class Attention(Loss):
    """L = mean of KL(teacher || student), or the squared error, of attention maps of selected layers: see `attention_loss`.

    Form `self`: each text over itself (MiniLMv2, arXiv 2012.15828); `interaction`: queries over passages (VIRT, arXiv
    2112.04195). The views' taps hold q and k [B, H, L, d] of each layer that is compared.

    >>> from types import SimpleNamespace
    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side, Views
    >>> from lead_ds.relevance import VectorFeatures
    >>> x = torch.randn(2, 4, 5, 8)  # two texts, four heads, five tokens
    >>> taps = {1: SimpleNamespace(q=x, k=x, mask=None, scale=1.0, causal=False, band=None)}
    >>> side = Side(VectorFeatures(x[None, :, 0, 0], x[None, :, 0, 0]), taps_queries=taps, taps_passages=taps)
    >>> loss = Attention(Attention.set(weight=1), LossShape(ModelFacts("dual_encoder", layers=2)))
    >>> abs(loss(Views(side, side, Scope(group_size=1), compared=([1], [1]))).item()) < 1e-6
    True
    """

    name, needs = "attention", frozenset({"attention"})
    Settings = selecting(AttentionSettings, default="last", k=1, ways=("random", "last", "skip", "given"))

    def forward(self, views: Views) -> Tensor:
        """A scalar. Raises InputError as `pair_taps` and `attention_loss`."""
        return attention_loss(pair_taps(views), self.settings, impl=self.shape.impl, mean_over=views.scope.mean)


def _self_attention(text: TextTaps, config: AttentionSettings, impl: Impl) -> Tensor:
    heads = _relation_heads(text, config)
    teacher_scales = [_scale(tap, heads) for tap in text.teacher]
    student_scales = [_scale(tap, heads) for tap in text.student]
    # Where the models see different keys, both are compared on the keys that both see.
    causal = any(tap.causal for tap in (*text.teacher, *text.student))
    bands = [_band(t, s) for t, s in zip(text.teacher, text.student, strict=True)]
    if text.teacher_groups is None or text.student_groups is None:
        return attention_kl(
            [tap.q.detach() for tap in text.teacher],
            [tap.k.detach() for tap in text.teacher],
            [tap.q for tap in text.student],
            [tap.k for tap in text.student],
            _mask(text),
            teacher_scale=teacher_scales,
            student_scale=student_scales,
            temperature=config.temperature,
            causal=causal,
            relation_heads=heads,
            band=bands,
            head_mean=config.heads == "mean",
            impl=impl,
        )
    if config.heads == "mean":
        raise InputError(f"{WHERE}.heads", "mean needs one tokenizer for both models", "use heads: relation")
    if any(band is not None for band in bands):
        what = "layers with a sliding window can be compared only with one tokenizer for both models"
        raise InputError(WHERE, what, "select layers with global attention")
    kls = []
    for teacher, student, t_scale, s_scale in zip(
        text.teacher, text.student, teacher_scales, student_scales, strict=True
    ):
        # One call per pair: the kernel takes one scale for all layers of a call.
        kl = grouped_attention_kl(
            teacher.q.detach(),
            teacher.k.detach(),
            student.q,
            student.k,
            text.teacher_groups,
            text.student_groups,
            teacher_scale=t_scale,
            student_scale=s_scale,
            temperature=config.temperature,
            causal=causal,
            relation_heads=heads,
            count=text.slots,
        )
        kls.append(kl)
    return torch.stack(kls).mean()


def _rows(text: TextTaps) -> Tensor:
    """How many rows the mean of `_self_attention` is over, float32: real tokens, or groups of tokens that both models have."""
    if text.teacher_groups is None or text.student_groups is None:
        mask, q = _mask(text), text.student[0].q
        return torch.full((), q.shape[0] * q.shape[2], device=q.device).float() if mask is None else mask.sum().float()
    t_BL, s_BL = text.teacher_groups, text.student_groups
    shared_BL = (t_BL[:, :, None] == s_BL[:, None, :]).any(-1) & (t_BL >= 0)
    first_BL = torch.ones_like(shared_BL)
    first_BL[:, 1:] = t_BL[:, 1:] != t_BL[:, :-1]  # a group's tokens stand side by side
    return (shared_BL & first_BL).sum().float()


def _interaction(texts: Sequence[TextTaps], config: AttentionSettings, impl: Impl) -> Tensor:
    if len(texts) != 2:
        what = "form: interaction needs queries and passages apart, these models read pairs"
        raise InputError(f"{WHERE}.form", what, "use form: self")
    if config.heads == "mean":
        raise InputError(f"{WHERE}.heads", "mean does not go with form: interaction", "use heads: relation")
    queries, passages = texts
    if queries.teacher_groups is not None:
        what = "interaction compares token with token, these models' tokenizers differ"
        raise InputError(f"{WHERE}.form", what, "use form: self, which compares words")
    heads = _relation_heads(queries, config)
    _relation_heads(passages, config)
    values = []
    for t_q, t_p, s_q, s_p in zip(queries.teacher, passages.teacher, queries.student, passages.student, strict=True):
        value = interaction_attention(
            _as_layers(t_q.q.detach(), t_q, heads),
            _as_layers(t_p.k.detach(), t_p, heads),
            _as_layers(s_q.q, s_q, heads),
            _as_layers(s_p.k, s_p, heads),
            _mask(queries),
            _mask(passages),
            divergence=config.divergence,
            teacher_scale=_scale(t_q, heads) / config.temperature,
            student_scale=_scale(s_q, heads) / config.temperature,
            impl=impl,
        )
        values.append(value)
    return torch.stack(values).mean()


def _relation_heads(text: TextTaps, config: AttentionSettings) -> int | None:
    """Into how many heads both models' are re-split; None: as they are."""
    teacher, student = text.teacher[0], text.student[0]
    if text.teacher_groups is None and teacher.q.shape[2] != student.q.shape[2]:
        what = f"teacher and student tokenise differently: {teacher.q.shape[2]} and {student.q.shape[2]} tokens"
        raise InputError(WHERE, what, "give both models one tokenizer and equal lengths, or set weight: 0")
    t_heads, s_heads = teacher.q.shape[1], student.q.shape[1]
    if config.heads == "mean":
        return None
    if config.heads == "pair":
        if t_heads != s_heads:
            what = f"pair needs equal heads, the teacher has {t_heads}, the student {s_heads}"
            raise InputError(f"{WHERE}.heads", what, "use heads: relation")
        return None
    heads = config.relation_heads or s_heads
    widths = {"teacher": t_heads * teacher.q.shape[3], "student": s_heads * student.q.shape[3]}
    for who, width in widths.items():
        if width % heads:
            what = f"{heads} heads do not divide the {who}'s attention width {width}"
            raise InputError(f"{WHERE}.relation_heads", what, f"use a divisor of {gcd(*widths.values())}")
    return None if heads == t_heads == s_heads else heads


def _scale(tap: Tap, heads: int | None) -> float:
    """What multiplies q . k: the model's own scale, or 1 / sqrt(width) of heads that are re-split."""
    own_heads, own_width = tap.q.shape[1], tap.q.shape[3]
    return tap.scale if heads is None or heads == own_heads else (own_heads * own_width / heads) ** -0.5


def _band(teacher: Tap, student: Tap) -> int | None:
    bands = [tap.band for tap in (teacher, student) if tap.band is not None]
    return min(bands, default=None)


def _as_layers(x: Tensor, tap: Tap, heads: int | None) -> Tensor:
    """[B, H, L, d] -> [heads, B, L, width]: heads take the place that the interaction kernel has for layers."""
    x_BHLd = x.repeat_interleave(tap.q.shape[1] // x.shape[1], dim=1)
    if heads is not None:
        x_BHLd = x_BHLd.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return x_BHLd.transpose(0, 1)


def _mask(text: TextTaps) -> Tensor | None:
    """[B, L]: tokens that are real for both models."""
    masks = [tap.mask for tap in (text.teacher[0], text.student[0]) if tap.mask is not None]
    return masks[0].bool() & masks[-1].bool() if masks else None
