"""Which layers are compared at a step. Layer i is the output of transformer layer i; embeddings do not count."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lead_ds.config import AttentionLoss, LayerLoss, LossesConfig
from lead_ds.errors import InputError

_STORE = "store more: lead-ds teach CONFIG --vectors LAYERS, in a new folder"


def select_layers(
    config: LayerLoss | AttentionLoss,
    teacher_layers: int,
    student_layers: int,
    *,
    seed: int,
    step: int,
    informative: Sequence[int] = (),
    stored: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Indices of the teacher's and the student's layers, sorted and paired in order.

    random: k drawn without replacement from each model, again every `every` steps, from (seed, step) alone: equal on
    every rank and after a resume. last: the last k of each. skip: k evenly spaced ones of each, the last among them.
    given: as configured. LEAD (arXiv 2212.05225), layer selection. informative: as random, with the teacher's layers drawn
    from `informative` alone (see `informative_layers`). stored: the teacher's layers that a cache holds, if not all; random
    ones are drawn from them.

    Raises InputError when k or a given index exceeds a model's layers, k the informative or stored ones, and for a layer
    that is not stored.
    """
    key = "losses.layer" if isinstance(config, LayerLoss) else "losses.attention"
    if config.select == "given":
        chosen = config.teacher_layers or [], config.student_layers or []
        for who, layers, count in zip(("teacher", "student"), chosen, (teacher_layers, student_layers), strict=True):
            _check_given(f"{key}.{who}_layers", who, layers, count)
        _check_stored(f"{key}.teacher_layers", chosen[0], stored)
        return list(chosen[0]), list(chosen[1])
    if config.k > min(teacher_layers, student_layers):
        what = f"{config.k} layers are to be selected, the teacher has {teacher_layers}, the student {student_layers}"
        raise InputError(f"{key}.k", what, f"use at most {min(teacher_layers, student_layers)}")
    draw = step // config.every
    if config.select == "informative":
        if config.k > len(informative):
            what = f"{config.k} layers are to be selected, {len(informative)} of the teacher's are informative"
            remedy = f"lower it, or {key}.informative_margin, or fit a lens: lead-ds fit-lens CONFIG"
            raise InputError(f"{key}.k", what, remedy)
        teacher = _drawn(informative, config.k, f"{key} {seed} {draw} teacher")
    elif config.select == "random" and stored is not None:
        if config.k > len(stored):
            what = f"{config.k} layers are to be selected at random, the cache holds {len(stored)}: {_listed(stored)}"
            raise InputError(f"{key}.k", what, f"use at most {len(stored)}, or {_STORE}" if stored else _STORE)
        teacher = _drawn(stored, config.k, f"{key} {seed} {draw} teacher")
    else:
        teacher = _select(config.select, config.k, teacher_layers, f"{key} {seed} {draw} teacher")
        _check_stored(f"{key}.select", teacher, stored)
    return teacher, _select(config.select, config.k, student_layers, f"{key} {seed} {draw} student")


def teacher_layers_needed(losses: LossesConfig, teacher_layers: int) -> int:
    """How many of a frozen teacher's first layers decide the losses: fewer than all where only given ones are compared."""
    compared = [loss for loss in (losses.layer, losses.attention) if loss.weight > 0]
    if losses.response.weight > 0 or losses.margin_mse.weight > 0 or any(loss.select != "given" for loss in compared):
        return teacher_layers
    return min(teacher_layers, 1 + max((i for loss in compared for i in loss.teacher_layers or []), default=0))


def informative_layers(nll: Sequence[float], chance: float, margin: float) -> list[int]:
    """The layers whose NLL of the positive is below chance (log N, of N passages) by at least `margin` nats."""
    return [layer for layer, value in enumerate(nll) if value <= chance - margin]


def _select(how: str, k: int, count: int, seed: str) -> list[int]:
    if how == "last":
        return list(range(count - k, count))
    if how == "skip":
        return [(i + 1) * count // k - 1 for i in range(k)]
    return sorted(random.Random(seed).sample(range(count), k))  # a string seed is hashed: the same on every machine


def _drawn(layers: Sequence[int], k: int, seed: str) -> list[int]:
    return [layers[place] for place in _select("random", k, len(layers), seed)]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _check_stored(where: str, layers: Sequence[int], stored: Sequence[int] | None) -> None:
    missing = [] if stored is None else [layer for layer in layers if layer not in stored]
    if missing:
        raise InputError(where, f"reads layer {missing[0]}, the cache holds layers {_listed(stored or [])}", _STORE)


def _check_given(where: str, who: str, layers: Sequence[int], count: int) -> None:
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        raise InputError(where, f"layer {beyond[0]} is beyond the {who}'s {count} layers", f"use 0 to {count - 1}")
