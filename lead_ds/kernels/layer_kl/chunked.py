"""Layer-relevance KL in torch, a block of query rows at a time: what a CPU runs.

Dimensions: K layer pairs, Q queries, P passages, D width (teacher and student each their own), N rows of one block.
"""

import torch
from torch import Tensor

from lead_ds.kernels.layer_kl.regime import saved_dtype, saved_shapes, stores_maps

# Scores of one map held at once where the maps are not stored: 8 MiB of float32 a map.
_CHUNK_SCORES = 1 << 21
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
    residual, lse = (
        torch.empty(shape, dtype=dtype, device=tq.device)
        for shape in saved_shapes("torch", layers, queries, passages, differentiable)
    )
    hidden_QP = _hidden(mask, target)
    if stores_maps(layers, queries, passages):
        t_KQP, s_KQP = torch.bmm(tq.to(dtype), td.to(dtype).mT), torch.bmm(sq.to(dtype), sd.to(dtype).mT)
        p_KQP, log_r_KQP, _, _ = _rows(
            t_KQP, s_KQP, target, hidden_QP, teacher_temperature, student_temperature, kl_KQ, nll_KQ
        )
        if differentiable:
            torch.sub(log_r_KQP.exp_(), p_KQP, out=residual)
        return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1), residual, lse
    for k in range(layers):
        td_PD, sd_PD = td[k].to(dtype), sd[k].to(dtype)
        for rows in _blocks(queries, passages):
            t_NP, s_NP = torch.mm(tq[k, rows].to(dtype), td_PD.T), torch.mm(sq[k, rows].to(dtype), sd_PD.T)
            hidden_NP = None if hidden_QP is None else hidden_QP[rows]
            _, _, lse_t, lse_s = _rows(
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
                lse[0, k, rows], lse[1, k, rows] = lse_t, lse_s
    return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1), residual, lse


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
    residual: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of sq and sd: dS = g_k / (Q T_s) (R - P), dq = dS d, dd = dS^T q."""
    layers, queries, _ = tq.shape
    passages = td.shape[1]
    dtype = saved_dtype(tq.dtype, sq.dtype)
    scale_K = grad_K.to(dtype) / (max(queries, 1) * student_temperature)
    if stores_maps(layers, queries, passages):
        ds_KQP = residual * scale_K[:, None, None]
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
            p_NP.div_(teacher_temperature).sub_(lse[0, k, rows, None]).exp_()
            ds_NP = r_NP.div_(student_temperature).sub_(lse[1, k, rows, None]).exp_().sub_(p_NP).mul_(scale_K[k])
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill a block's KL and NLL from its scores (leading dimensions are free); also tempers and masks the scores in place.

    Returns the teacher's probabilities, the student's log-probabilities, and the two log-sum-exps.
    """
    if hidden_NP is not None:
        # Finite, so that the difference of two hidden log-probabilities is a number, which probability 0 then cancels.
        t_NP.masked_fill_(hidden_NP, -1e30)
        s_NP.masked_fill_(hidden_NP, -1e30)
    place_N1 = target.expand(t_NP.shape[:-1])[..., None]
    if teacher_temperature != 1.0:
        nll_N.copy_(torch.logsumexp(t_NP, dim=-1).sub_(t_NP.gather(-1, place_N1).squeeze(-1)))
        t_NP.div_(teacher_temperature)
    if student_temperature != 1.0:
        s_NP.div_(student_temperature)
    p_NP, log_r_NP = torch.log_softmax(t_NP, dim=-1), torch.log_softmax(s_NP, dim=-1)
    # The target is never hidden, so its score less its log-probability is the log-sum-exp, with no pass over the row.
    log_p_N1 = p_NP.gather(-1, place_N1)
    lse_t = (t_NP.gather(-1, place_N1) - log_p_N1).squeeze(-1)
    lse_s = (s_NP.gather(-1, place_N1) - log_r_NP.gather(-1, place_N1)).squeeze(-1)
    if teacher_temperature == 1.0:
        nll_N.copy_(log_p_N1.squeeze(-1).neg_())
    difference_NP = torch.sub(p_NP, log_r_NP, out=t_NP)
    p_NP.exp_()
    torch.sum(difference_NP.mul_(p_NP), dim=-1, out=kl_N)
    return p_NP, log_r_NP, lse_t, lse_s
