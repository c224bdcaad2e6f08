"""The attention divergences in plain torch, with full maps: what every other implementation is measured against.

Any floating dtype, differentiable by autograd to the student (and, being plain torch, to the teacher too).

Legend: B batch, H heads, L query rows, J keys, Q queries, P passages, K layers, G groups of tokens.
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


def interaction_reference(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    divergence: str = "kl",
    teacher_scale: float = 1.0,
    student_scale: float = 1.0,
    pairs: str = "all",
) -> Tensor:
    """`interaction_attention`, a scalar, with the full maps in memory: q [K, Q, Lq, D], d [K, P, Ld, D].

    Source of the term: VIRT (Li et al., 2021), as the LEAD baselines use it (Sun et al., 2023).
    """
    queries, passages = tq.shape[1], td.shape[1]
    q_real = torch.ones(tq.shape[1:3], device=tq.device) if q_mask is None else q_mask
    d_real = torch.ones(td.shape[1:3], device=tq.device) if d_mask is None else d_mask
    q_real, d_real = q_real != 0, d_real != 0
    tq, sq = (torch.where(q_real[None, :, :, None], x, 0.0) for x in (tq, sq))
    td, sd = (torch.where(d_real[None, :, :, None], x, 0.0) for x in (td, sd))
    if pairs == "own":
        per_query = passages // queries
        tq, sq = (x.repeat_interleave(per_query, dim=1) for x in (tq, sq))
        q_real = q_real.repeat_interleave(per_query, dim=0)
        equation, visible, rows_real = "kpid,kpjd->kpij", d_real[:, None, :], q_real
        rows_real = rows_real & d_real.any(-1)[:, None]
    else:
        equation, visible = "kqid,kpjd->kqpij", d_real[:, None, :]
        rows_real = q_real[:, None, :] & d_real.any(-1)[None, :, None]
    log_probs = []
    for q, d, scale in ((tq, td, teacher_scale), (sq, sd, student_scale)):
        logits = torch.einsum(equation, q, d) * scale
        log_probs.append(logits.masked_fill(~visible, hidden_logit(logits.dtype)).log_softmax(-1))
    weight = rows_real.to(tq.dtype)
    layers = tq.shape[0]
    if divergence == "kl":
        return (kl_of_log_probs(*log_probs) * weight).sum() / (weight.sum().clamp_min(1) * layers)
    squares = (log_probs[0].exp() - log_probs[1].exp()).square().sum(-1)
    maps = passages if pairs == "own" else queries * passages
    return (squares * weight).sum() / (max(maps, 1) * layers)


def grouped_attention_kl_reference(
    tq: Tensor,
    tk: Tensor,
    sq: Tensor,
    sk: Tensor,
    t_groups: Tensor,
    s_groups: Tensor,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    temperature: float = 1.0,
    relation_heads: int | None = None,
) -> Tensor:
    """`grouped_attention_kl` of one layer pair, a scalar, by loops over texts, heads and groups.

    tq [B, Ht, Lt, dt], sq [B, Hs, Ls, ds] with their keys; t_groups [B, Lt], s_groups [B, Ls], -1 = in no group.
    """
    if relation_heads is not None:
        tq, tk = (relation_split(x, tq.shape[1], relation_heads) for x in (tq, tk))
        sq, sk = (relation_split(x, sq.shape[1], relation_heads) for x in (sq, sk))
    total, rows = sq.new_zeros(()), 0
    for b in range(tq.shape[0]):
        common = sorted((set(t_groups[b].tolist()) & set(s_groups[b].tolist())) - {-1})
        if not common:
            continue
        maps = []
        for q, k, groups, scale in ((tq, tk, t_groups, teacher_scale), (sq, sk, s_groups, student_scale)):
            scale = (q.shape[3] ** -0.5 if scale is None else scale) / temperature
            member = torch.stack([groups[b] == g for g in common])
            log_probs = attention_log_probs(q[b : b + 1], k[b : b + 1], scale, member.any(0))[0]
            keys = torch.stack([log_probs[..., m].logsumexp(-1) for m in member], dim=-1)
            maps.append(torch.stack([keys[:, m].exp().mean(1) for m in member], dim=1).log())
        total = total + kl_of_log_probs(*maps).mean(0).sum()
        rows += len(common)
    return total / max(rows, 1)
