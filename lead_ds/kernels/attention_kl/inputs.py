"""What a caller may pass to `attention_kl`, checked and brought to one form: a list of layer pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor]
_T = TypeVar("_T")


class Maps(NamedTuple):
    """What a model's attention maps are made of: queries [B, H, L, d] and keys [B, H / G, L, d], or a list of each.

    scale: multiplies q . k; None: 1 / sqrt(d), after relation heads. Of several layers, one or one each.
    """

    q: Tensors
    k: Tensors
    scale: float | Sequence[float] | None = None


@dataclass(frozen=True)
class LayerPair:
    """One teacher layer and the student layer that imitates it.

    tq [B, Ht, L, dt], tk [B, Ht / Gt, L, dt], sq [B, Hs, L, ds], sk [B, Hs / Gs, L, ds]. The scales multiply q . k and
    already hold the temperature. `band` hides keys farther than that many positions (None: no key).
    """

    tq: Tensor
    tk: Tensor
    sq: Tensor
    sk: Tensor
    teacher_scale: float
    student_scale: float
    band: int | None


def layer_pairs(
    teacher: Maps,
    student: Maps,
    mask: Tensor | None,
    *,
    temperature: float,
    relation_heads: int | None,
    band: int | Sequence[int | None] | None,
    head_mean: bool,
) -> list[LayerPair]:
    """The checked layer pairs of a call, heads already re-split where relation heads are requested.

    Raises ValueError where shapes, head counts or arguments do not fit, or where the teacher requires grad.
    """
    teacher_q, teacher_k, student_q, student_k = map(_as_list, (*teacher[:2], *student[:2]))
    count = len(teacher_q)
    if count == 0 or not (len(teacher_k) == len(student_q) == len(student_k) == count):
        raise ValueError(
            f"attention_kl: {count} teacher q, {len(teacher_k)} teacher k, {len(student_q)} student q, "
            f"{len(student_k)} student k; pass one of each per layer pair, and at least one pair"
        )
    if not temperature > 0:
        raise ValueError(f"attention_kl: temperature must be positive, not {temperature}")
    if any(tensor.requires_grad for tensor in (*teacher_q, *teacher_k)):
        raise ValueError("attention_kl: the teacher's q and k get no gradient; detach() them")

    teacher_scales = _spread(teacher.scale, count, "teacher_scale")
    student_scales = _spread(student.scale, count, "student_scale")
    bands = _spread(band, count, "band")
    pairs = []
    for k in range(count):
        _check(teacher_q[k], teacher_k[k], student_q[k], student_k[k], mask, reference=teacher_q[0])
        t_q, t_k = _relation(teacher_q[k], teacher_k[k], relation_heads)
        s_q, s_k = _relation(student_q[k], student_k[k], relation_heads)
        if t_q.shape[1] != s_q.shape[1] and not head_mean:
            raise ValueError(
                f"attention_kl: {t_q.shape[1]} teacher heads cannot be paired with {s_q.shape[1]} student heads; "
                "pass relation_heads=R (a divisor of both widths) or head_mean=True"
            )
        pairs.append(
            LayerPair(
                t_q,
                t_k,
                s_q,
                s_k,
                _scale(teacher_scales[k], t_q) / temperature,
                _scale(student_scales[k], s_q) / temperature,
                _band(bands[k], length=t_q.shape[2]),
            )
        )
    return pairs


def relation_split(x: Tensor, heads: int, relation_heads: int) -> Tensor:
    """[B, H, L, d] -> [B, R, L, heads * d / R]: heads concatenated and re-split, after grouped heads are repeated.

    Tensors that come from a projection keep the heads of a token together in memory, so this is a view of them.
    Source: MiniLMv2 (Wang et al., 2021), section 3.1. Raises ValueError if R does not divide the width.
    """
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    batch, _, length, dim = x.shape
    if relation_heads < 1 or (heads * dim) % relation_heads:
        raise ValueError(f"attention_kl: relation_heads={relation_heads} does not divide the width {heads * dim}")
    width = heads * dim // relation_heads
    return x.transpose(1, 2).reshape(batch, length, relation_heads, width).transpose(1, 2)


def _relation(q: Tensor, k: Tensor, relation_heads: int | None) -> tuple[Tensor, Tensor]:
    if relation_heads is None or relation_heads == q.shape[1]:
        return q, k
    heads = q.shape[1]
    return relation_split(q, heads, relation_heads), relation_split(k, heads, relation_heads)


def _check(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, mask: Tensor | None, *, reference: Tensor) -> None:
    for name, tensor in (("tq", tq), ("tk", tk), ("sq", sq), ("sk", sk)):
        if tensor.dim() != 4:
            raise ValueError(f"attention_kl: {name} must be [B, H, L, d], not {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"attention_kl: {name} must be floating point, not {tensor.dtype}")
        if (tensor.shape[0], tensor.shape[2]) != (reference.shape[0], reference.shape[2]):
            raise ValueError(
                f"attention_kl: {name} has batch and length {(tensor.shape[0], tensor.shape[2])}, the first teacher "
                f"layer {(reference.shape[0], reference.shape[2])}; across tokenizers use grouped_attention_kl"
            )
    for model, q, k in (("teacher", tq, tk), ("student", sq, sk)):
        if q.shape[3] != k.shape[3] or q.shape[3] == 0:
            raise ValueError(f"attention_kl: {model} q and k have head dimensions {q.shape[3]} and {k.shape[3]}")
        if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise ValueError(f"attention_kl: {model} has {q.shape[1]} query heads for {k.shape[1]} key heads")
    if mask is not None and mask.shape != (tq.shape[0], tq.shape[2]):
        raise ValueError(f"attention_kl: mask must be {[tq.shape[0], tq.shape[2]]}, not {list(mask.shape)}")


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _band(band: int | None, length: int) -> int | None:
    if band is None or band >= length - 1:
        return None
    if band < 0:
        raise ValueError(f"attention_kl: band must be at least 0, not {band}")
    return int(band)


def _as_list(tensors: Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _spread(value: _T | Sequence[_T], count: int, name: str) -> list[_T]:
    if not isinstance(value, (list, tuple)):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"attention_kl: {len(value)} values of {name} for {count} layer pairs")
    return list(value)
