"""Layer-relevance KL in torch, a block of query rows at a time: what a CPU runs.

Dimensions: K layer pairs, Q queries, P passages, D width (teacher and student each their own), N rows of one block.
"""

import torch
from torch import Tensor

from lead_ds.kernels.layer_kl.regime import saved_dtype, saved_shapes, stores_residual

# Scores of one map held at once where the maps are not stored: 4 MiB of float32 a map.
_CHUNK_SCORES = 1 << 20
# Fewer rows than this waste the matrix product.
_CHUNK_ROWS = 32


def forward(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kl [K], teacher_nll [K], saved, saved); what is saved is described in `regime.saved_shapes`."""
    layers, queries, _ = tq.shape
    passages = td.shape[1]
    dtype = saved_dtype(tq.dtype, sq.dtype)
    kl_KQ = torch.empty(layers, queries, dtype=dtype, device=tq.device)
    nll_KQ = torch.empty_like(kl_KQ)
    first, second = (
        torch.empty(shape, dtype=dtype, device=tq.device)
        for shape in saved_shapes(layers, queries, passages, differentiable)
    )
    hidden_QP = _hidden(mask, target)
    if stores_residual(layers, queries, passages):
        t_KQP, s_KQP = torch.bmm(tq.to(dtype), td.to(dtype).mT), torch.bmm(sq.to(dtype), sd.to(dtype).mT)
        _rows(t_KQP, s_KQP, target, hidden_QP, teacher_temperature, student_temperature, kl_KQ, nll_KQ)
        if differentiable:
            torch.sub(s_KQP.exp_(), t_KQP.exp_(), out=first)
        return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1), first, second
    for k in range(layers):
        td_PD, sd_PD = td[k].to(dtype), sd[k].to(dtype)
        for rows in _blocks(queries, passages):
            t_NP, s_NP = torch.mm(tq[k, rows].to(dtype), td_PD.T), torch.mm(sq[k, rows].to(dtype), sd_PD.T)
            hidden_NP = None if hidden_QP is None else hidden_QP[rows]
            lse_t, lse_s = _rows(
                t_NP,
                s_NP,
                target[rows],
                hidden_NP,
                teacher_temperature,
                student_temperature,
                kl_KQ[k, rows],
                nll_KQ[k, rows],
            )
            if differentiable:
                first[k, rows], second[k, rows] = lse_t, lse_s
    return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1), first, second


def backward(
    grad_K: Tensor,
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of sq and sd: dS = g_k / (Q T_s) (R - P), dq = dS d, dd = dS^T q."""
    layers, queries, _ = tq.shape
    passages = td.shape[1]
    dtype = saved_dtype(tq.dtype, sq.dtype)
    scale_K = grad_K.to(dtype) / (max(queries, 1) * student_temperature)
    if stores_residual(layers, queries, passages):
        ds_KQP = first * scale_K[:, None, None]
        return torch.bmm(ds_KQP, sd.to(dtype)).to(sq.dtype), torch.bmm(ds_KQP.mT, sq.to(dtype)).to(sd.dtype)
    hidden_QP = _hidden(mask, target)
    dsq, dsd = torch.empty_like(sq), torch.empty_like(sd)
    for k in range(layers):
        td_PD, sd_PD = td[k].to(dtype), sd[k].to(dtype)
        # Summed over blocks, so held in the accumulation dtype: for float32 that is the result itself.
        sum_PD = (dsd[k] if dsd.dtype == dtype else torch.empty_like(sd_PD)).zero_()
        for rows in _blocks(queries, passages):
            sq_ND = sq[k, rows].to(dtype)
            p_NP, r_NP = torch.mm(tq[k, rows].to(dtype), td_PD.T), torch.mm(sq_ND, sd_PD.T)
            p_NP.div_(teacher_temperature).sub_(first[k, rows, None]).exp_()
            ds_NP = r_NP.div_(student_temperature).sub_(second[k, rows, None]).exp_().sub_(p_NP).mul_(scale_K[k])
            if hidden_QP is not None:
                ds_NP.masked_fill_(hidden_QP[rows], 0)
            dsq[k, rows] = torch.mm(ds_NP, sd_PD)
            sum_PD.addmm_(ds_NP.T, sq_ND)
        if sum_PD.dtype != dsd.dtype:
            dsd[k] = sum_PD
    return dsq, dsd


def _blocks(queries: int, passages: int) -> list[slice]:
    rows = max(_CHUNK_ROWS, _CHUNK_SCORES // max(passages, 1))
    return [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]


def _hidden(mask: Tensor | None, target: Tensor) -> Tensor | None:
    """True where a passage is left out of a query's distributions; never the target."""
    return None if mask is None else (~mask).scatter_(1, target[:, None], False)


def _rows(
    t_NP: Tensor,
    s_NP: Tensor,
    target: Tensor,
    hidden_NP: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    kl_N: Tensor,
    nll_N: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill a block's KL and NLL; turn its scores, in place, into log-probabilities; return the two log-sum-exps.

    Leading dimensions are free. Hidden entries end at -inf, which is probability 0 on both sides.
    """
    if hidden_NP is not None:
        t_NP.masked_fill_(hidden_NP, float("-inf"))
        s_NP.masked_fill_(hidden_NP, float("-inf"))
    place = target.expand(t_NP.shape[:-1])[..., None]
    nll_N.copy_(torch.logsumexp(t_NP, dim=-1) - t_NP.gather(-1, place).squeeze(-1))
    lse_t, lse_s = _normalise_(t_NP, teacher_temperature), _normalise_(s_NP, student_temperature)
    difference_NP = t_NP - s_NP
    if hidden_NP is not None:
        difference_NP.masked_fill_(hidden_NP, 0)
    kl_N.copy_(difference_NP.mul_(t_NP.exp()).sum(dim=-1))
    return lse_t, lse_s


def _normalise_(scores_NP: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        scores_NP.div_(temperature)
    lse_N = torch.logsumexp(scores_NP, dim=-1)
    scores_NP.sub_(lse_N[..., None])
    return lse_N
