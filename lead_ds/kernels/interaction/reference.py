"""The interaction divergence in plain torch, with full maps: what every other implementation is measured against."""

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.reference import hidden_logit, kl_of_log_probs


def interaction_reference(
    teacher: tuple[Tensor, Tensor, float],
    student: tuple[Tensor, Tensor, float],
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    divergence: str = "kl",
    pairs: str = "all",
) -> Tensor:
    """`interaction_attention`, a scalar, with the full maps in memory.

    teacher, student: q [K, Q, Lq, D], d [K, P, Ld, D], and what multiplies their products.
    Source of the term: VIRT (Li et al., 2021), as the LEAD baselines use it (Sun et al., 2023).
    """
    (tq, td, teacher_scale), (sq, sd, student_scale) = teacher, student
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
