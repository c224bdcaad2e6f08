"""Attention distributions of selected layers: of each text over itself, or of queries over passages.

Dimensions: K layer pairs, B texts, H heads, L tokens, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from lead_ds.config import AttentionLoss
from lead_ds.errors import InputError
from lead_ds.kernels import attention_kl, grouped_attention_kl, interaction_attention
from lead_ds.relevance import Impl

WHERE = "losses.attention"


class Tap(Protocol):
    """What one layer's attention read: q [B, H, L, d], k (fewer heads: grouped queries), mask [B, L] (1: a token).

    causal: later keys are hidden; window: so are keys farther than that many positions (None: none).
    """

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def causal(self) -> bool: ...
    @property
    def window(self) -> int | None: ...


class Tapped(Protocol):
    """A model's output with the taps of its selected layers, in order, of queries and of passages (or of pairs)."""

    @property
    def taps_queries(self) -> Mapping[int, Tap] | None: ...
    @property
    def taps_passages(self) -> Mapping[int, Tap] | None: ...


@dataclass(frozen=True)
class TextTaps:
    """Taps of both models on the same texts, layer pair by layer pair.

    teacher_groups [B, Lt], student_groups [B, Ls] (int64, -1: none; see `data.tokens.alignment`) where tokenizers differ;
    None where they are the same.
    """

    teacher: Sequence[Tap]
    student: Sequence[Tap]
    teacher_groups: Tensor | None = None
    student_groups: Tensor | None = None


def attention_loss(texts: Sequence[TextTaps], config: AttentionLoss, *, impl: Impl = "auto") -> Tensor:
    """Divergence of the student's attention from the teacher's; gradient to the student only. A float32 scalar.

    texts: queries and passages, in this order. Form `self`: KL(teacher || student) over keys in nats, mean over real
    query rows, heads and layer pairs, then over the kinds of text (MiniLMv2, arXiv 2012.15828, where heads are
    re-split). Form `interaction`: query tokens over passage tokens, every query against every passage of the
    micro-batch, KL or squared error (VIRT, arXiv 2112.04195).

    Raises InputError where the models' tokenizers or heads cannot be compared as configured.
    """
    if config.form == "interaction":
        return _interaction(texts, config, impl)
    return torch.stack([_self_attention(text, config, impl) for text in texts]).mean()


Groups = tuple[Tensor, Tensor]
"""[B, Lt] and [B, Ls]: the groups of the teacher's and of the student's tokens."""


def pair_taps(teacher: Tapped, student: Tapped, groups: Sequence[Groups | None] = (None, None)) -> list[TextTaps]:
    """The taps of two outputs on the same texts: of queries, then of passages. `groups`: of either, where tokenizers differ."""
    pairs = []
    for t, s, group in (
        (teacher.taps_queries, student.taps_queries, groups[0]),
        (teacher.taps_passages, student.taps_passages, groups[1]),
    ):
        # A model that reads pairs has no taps of queries: its maps are of other texts than a dual encoder's.
        if t and s and bool(teacher.taps_queries) == bool(student.taps_queries):
            pairs.append(TextTaps(list(t.values()), list(s.values()), *(group or (None, None))))
    if not pairs:
        raise InputError(
            WHERE, "the models read different kinds of text", "compare models of one kind, or set weight: 0"
        )
    return pairs


def _self_attention(text: TextTaps, config: AttentionLoss, impl: Impl) -> Tensor:
    heads = _relation_heads(text, config)
    teacher_scales = [_scale(tap, heads) for tap in text.teacher]
    student_scales = [_scale(tap, heads) for tap in text.student]
    # Where the models see different keys, both are compared on the keys that both see.
    causal = any(tap.causal for tap in (*text.teacher, *text.student))
    windows = [_window(t, s) for t, s in zip(text.teacher, text.student, strict=True)]
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
            window=windows,
            head_mean=config.heads == "mean",
            impl=impl,
        )
    if config.heads == "mean":
        raise InputError(f"{WHERE}.heads", "mean needs one tokenizer for both models", "use heads: relation")
    if any(window is not None for window in windows):
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
        )
        kls.append(kl)
    return torch.stack(kls).mean()


def _interaction(texts: Sequence[TextTaps], config: AttentionLoss, impl: Impl) -> Tensor:
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


def _relation_heads(text: TextTaps, config: AttentionLoss) -> int | None:
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


def _window(teacher: Tap, student: Tap) -> int | None:
    windows = [tap.window for tap in (teacher, student) if tap.window is not None]
    return min(windows, default=None)


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
