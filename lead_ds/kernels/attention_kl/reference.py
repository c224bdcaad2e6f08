"""The attention KL in plain torch, with full maps: what every other implementation is measured against.

Any floating dtype, differentiable by autograd to the student (and, being plain torch, to the teacher too).

Legend: B batch, H heads, L query rows, J keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.inputs import Maps, relation_split

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


def scaled(maps: Maps, relation_heads: int | None, temperature: float) -> tuple[Tensor, Tensor, float]:
    """One layer's queries and keys, in relation heads where these are requested, and what multiplies their products."""
    q, k = maps.q, maps.k
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert not isinstance(maps.scale, Sequence)
    if relation_heads is not None:
        heads = q.shape[1]
        q, k = relation_split(q, heads, relation_heads), relation_split(k, heads, relation_heads)
    return q, k, (q.shape[3] ** -0.5 if maps.scale is None else maps.scale) / temperature


def attention_kl_reference(
    teacher: Maps,
    student: Maps,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    causal: bool = False,
    relation_heads: int | None = None,
    band: int | None = None,
    head_mean: bool = False,
) -> Tensor:
    """`attention_kl` of one layer pair, a scalar, with the full maps in memory. mask: [B, L]."""
    (tq, tk, t_scale), (sq, sk, s_scale) = (scaled(maps, relation_heads, temperature) for maps in (teacher, student))
    batch, _, length, _ = tq.shape
    real_BL = torch.ones(batch, length, device=tq.device) if mask is None else mask.to(tq.device)
    real_BL = real_BL != 0
    keep = real_BL[:, None, :, None]
    # A padded token may hold anything, NaN included, and 0 * NaN would reach the gradient.
    tq, tk, sq, sk = (torch.where(keep, x, 0.0) for x in (tq, tk, sq, sk))
    visible = real_BL[:, None, None, :] & visible_band(length, causal, band, tq.device)
    log_t, log_s = attention_log_probs(tq, tk, t_scale, visible), attention_log_probs(sq, sk, s_scale, visible)
    if head_mean:
        tiny = torch.finfo(log_t.dtype).tiny
        log_t, log_s = (x.exp().mean(1, keepdim=True).clamp_min(tiny).log() for x in (log_t, log_s))
    rows = kl_of_log_probs(log_t, log_s)
    weight = real_BL[:, None, :].to(rows.dtype)
    return (rows * weight).sum() / (weight.sum().clamp_min(1) * rows.shape[1])
