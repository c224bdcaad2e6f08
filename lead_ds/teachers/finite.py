"""A teacher whose output is not finite ends the run, and one that is constant is told: looked at in the first window and at
every logged step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import Tokens, score_mask
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError, RunError
from lead_ds.io.notes import say_once
from lead_ds.relevance import Features
from lead_ds.teachers.frozen import FrozenTeacher
from lead_ds.teachers.teacher import Teacher, TeacherView

_REMEDY = {torch.float16: "set {key}.dtype=bf16", torch.bfloat16: "set {key}.dtype=fp32"}


def check_finite(key: str, teacher: Teacher, view: TeacherView, batches: Sequence[ModelBatch], ranks: Ranks) -> None:
    """Raise InputError on every process where a model gave one of them what is not finite, naming the layer where it began.

    key: the teacher's section. view: what it gave for `batches`. Every process calls this; a sharded model then reads again.
    """
    if not isinstance(teacher, FrozenTeacher):  # what a cache or a file holds was checked as it was written
        return
    if all(ranks.all(finite(view.final) and (view.layers is None or finite(view.layers)))):
        return
    layers = range(teacher.num_layers)  # none of a module of one's own that exposes none
    read = teacher.window(batches, layers).layers if layers else None
    broken = [] if read is None else [layer for layer in layers if not finite(read.at([layer]))]
    layer = min((first for first in ranks.all(broken[0] if broken else None) if first is not None), default=None)
    began = "in its final state" if layer is None else f"from its layer {layer} on"
    dtype = next(teacher.scorer.parameters()).dtype
    name = str(dtype).removeprefix("torch.")
    what = f"is {name}, in which {teacher.scorer.config.path} gives numbers that are not finite, {began}"
    raise InputError(f"{key}.dtype", what, remedy_of(dtype, key))


def say_constant(key: str, view: TeacherView, group_size: int, ranks: Ranks) -> None:
    """Say on rank 0 where a teacher gives every passage of a query the same relevance, for all queries of a window.

    key: its section. group_size: passages of each query. Every process calls this.
    """
    if group_size < 2:
        return
    logits_QN = view.final.group_relevance(group_size).logits[-1]
    if all(ranks.all(bool((logits_QN == logits_QN[:, :1]).all()))) and ranks.main:
        say_once(constant(f"{key}: gives", "of a step"))


def constant(who: str, which: str) -> str:
    """What to say of a teacher that prefers no passage. which: of what the queries are all."""
    what = f"all passages of a query the same relevance, for all queries {which}: losses over passages teach nothing"
    return f"{who} {what} (see its lengths and template with lead-ds inspect, or its scores)"


def refuse_not_finite(teacher: FrozenTeacher, looked: Tensor, tokens: Tokens, texts: Sequence[Any]) -> None:
    """Raise RunError naming the first text, or pair of texts, for which a teacher gave what is not finite.

    looked [K, B, ...]: what it gave for `tokens` of B `texts`.
    """
    finite_KBx = looked.isfinite()
    if looked.dim() == 4:  # states of tokens, of which some do not count
        finite_KBx |= (score_mask(tokens) == 0)[None, :, :, None]
    finite_B = finite_KBx.transpose(0, 1).flatten(1).all(1)
    if finite_B.all():
        return
    text = texts[int((~finite_B).nonzero()[0])]
    shown = " with ".join(
        repr(part[:80]) for part in ([text] if isinstance(text, str) else text) if isinstance(part, str)
    )
    dtype = next(teacher.scorer.parameters()).dtype
    what = f"gives numbers that are not finite, as {str(dtype).removeprefix('torch.')}, for {shown}"
    raise RunError(teacher.scorer.config.path, what, remedy_of(dtype, "teacher"))


def remedy_of(dtype: torch.dtype, key: str) -> str:
    """What to do about a teacher of section `key` that gives what is not finite."""
    weights = "see the model's weights: lead-ds inspect names those that are not finite"
    return f"{_REMEDY[dtype].format(key=key)}; else {weights}" if dtype in _REMEDY else weights


def finite(features: Features) -> bool:
    """Whether all numbers of a model's features are."""
    return all(bool(x.isfinite().all()) for x in features.tensors())
