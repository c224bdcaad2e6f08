"""The attention KL in plain torch, with full maps: what every other implementation is measured against.

Any floating dtype, differentiable by autograd to the student (and, being plain torch, to the teacher too).

Legend: B batch, H heads, L query rows, J keys.
"""

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.inputs import relation_split

# Finite, so that a row without visible keys stays free of NaN, and far below any logit.
HIDDEN = -1e30


def hidden_logit(dtype: torch.dtype) -> float:
    """The logit of a key that a row does not see."""
    return max(HIDDEN, torch.finfo(dtype).min)


def visible_band(length: int, causal: bool, band: int | None, device: torch.device) -> Tensor:
    """[L, L] bool: which keys a row may see by position alone; `band` is the largest |row - key|."""
    row = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    visible = key <= row if causal else torch.ones(length, length, dtype=torch.bool, device=device)
    return visible if band is None else visible & ((row - key).abs() <= band)


def attention_log_probs(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """log softmax(scale q k^T) over the visible keys: q [B, H, L, d], k [B, H / G, J, d] -> [B, H, L, J]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(-1, -2)) * scale
    return logits.masked_fill(~visible, hidden_logit(logits.dtype)).log_softmax(-1)


def kl_of_log_probs(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) over the last axis of two tensors of log-probabilities; impossible events add 0."""
    probability = teacher.exp()
    return torch.where(probability == 0, 0.0, probability * (teacher - student)).sum(-1)


def attention_kl_reference(
    tq: Tensor,
    tk: Tensor,
    sq: Tensor,
    sk: Tensor,
    mask: Tensor | None = None,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    relation_heads: int | None = None,
    band: int | None = None,
    head_mean: bool = False,
) -> Tensor:
    """`attention_kl` of one layer pair, a scalar, with the full maps in memory.

    tq [B, Ht, L, dt], tk [B, Ht / Gt, L, dt], sq [B, Hs, L, ds], sk [B, Hs / Gs, L, ds], mask [B, L].
    """
    if relation_heads is not None:
        tq, tk = (relation_split(x, tq.shape[1], relation_heads) for x in (tq, tk))
        sq, sk = (relation_split(x, sq.shape[1], relation_heads) for x in (sq, sk))
    batch, _, length, _ = tq.shape
    real_BL = torch.ones(batch, length, device=tq.device) if mask is None else mask.to(tq.device)
    real_BL = real_BL != 0
    keep = real_BL[:, None, :, None]
    # A padded token may hold anything, NaN included, and 0 * NaN would reach the gradient.
    tq, tk, sq, sk = (torch.where(keep, x, 0.0) for x in (tq, tk, sq, sk))
    visible = real_BL[:, None, None, :] & visible_band(length, causal, band, tq.device)
    scales = [
        (x.shape[3] ** -0.5 if scale is None else scale) / temperature
        for x, scale in ((tq, teacher_scale), (sq, student_scale))
    ]
    teacher = attention_log_probs(tq, tk, scales[0], visible)
    student = attention_log_probs(sq, sk, scales[1], visible)
    if head_mean:
        tiny = torch.finfo(teacher.dtype).tiny
        teacher, student = (x.exp().mean(1, keepdim=True).clamp_min(tiny).log() for x in (teacher, student))
    rows = kl_of_log_probs(teacher, student)
    weight = real_BL[:, None, :].to(rows.dtype)
    return (rows * weight).sum() / (weight.sum().clamp_min(1) * rows.shape[1])
