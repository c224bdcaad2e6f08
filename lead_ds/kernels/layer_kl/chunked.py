"""Layer-relevance KL in torch, a block of layers and query rows at a time: what a CPU runs.

What the gradient needs comes out of the same visit as the value, for the scores are there anyway, and none is computed
twice. For the backward pass waits whatever is smaller: the map of R - P (student minus teacher probability), or, where
queries outnumber the width, the gradient itself. Either is at most as large as the gradient, which eager holds as well.

Dimensions: K layer pairs, Q queries, P passages, D width (teacher and student each their own), N rows of one block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lead_ds.kernels.layer_kl.inputs import Problem, keeps_residual, saved_shapes

# Scores of one map of a block: 2 MiB of float32, so that both models' stay in a core's cache.
_CHUNK_SCORES = 1 << 19
# Beside what was kept, so much of the map waits for its two products.
_BACKWARD_SCORES = 1 << 16
# A probability below this has lost digits, or will have.
_UNDERFLOWS = 1e-30
# Fewer rows than this waste the matrix product: measured at 8192 passages, 64 rows take 1.14 of the time of 256.
_CHUNK_ROWS = 256


def forward(problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kl [K], teacher_nll [K], saved, saved); what is saved is described in `inputs.saved_shapes`."""
    (tq, td, t_temperature), (sq, sd, s_temperature) = problem.teacher[:3], problem.student[:3]
    layers, queries, passages = problem.shape
    new: dict[str, Any] = {"dtype": problem.dtype, "device": sq.device}
    kl_KQ, nll_KQ = torch.empty(layers, queries, **new), torch.empty(layers, queries, **new)
    saved, dsd = (torch.empty(shape, **new) for shape in saved_shapes(problem, "torch", differentiable))
    hidden_QP = None if problem.mask is None else (~problem.mask).scatter_(1, problem.target[:, None], False)
    scale = 1 / (max(queries, 1) * s_temperature)
    for ks in _layer_groups(layers, queries, passages, at_once=_CHUNK_SCORES):
        td_KPD, sd_KPD = td[ks].to(problem.dtype), sd[ks].to(problem.dtype)
        for rows in _row_blocks(queries, passages):
            sq_KND = sq[ks, rows].to(problem.dtype)
            t_KNP = torch.bmm(tq[ks, rows].to(problem.dtype), td_KPD.mT)
            s_KNP = torch.bmm(sq_KND, sd_KPD.mT)
            if hidden_QP is not None:
                # Finite, so that the difference of two hidden log-probabilities is a number, which probability 0 cancels.
                t_KNP.masked_fill_(hidden_QP[rows], -1e30)
                s_KNP.masked_fill_(hidden_QP[rows], -1e30)
            place_KN1 = problem.target[rows].expand(t_KNP.shape[:-1])[..., None]
            if t_temperature != 1.0:
                nll_KQ[ks, rows] = torch.logsumexp(t_KNP, dim=-1) - t_KNP.gather(-1, place_KN1).squeeze(-1)
                t_KNP.div_(t_temperature)
            if s_temperature != 1.0:
                s_KNP.div_(s_temperature)
            p_KNP, r_KNP = torch.softmax(t_KNP, dim=-1), torch.softmax(s_KNP, dim=-1)
            t_lse_KN1, s_lse_KN1 = _logsumexp(t_KNP, p_KNP, place_KN1), _logsumexp(s_KNP, r_KNP, place_KN1)
            if t_temperature == 1.0:
                nll_KQ[ks, rows] = (t_lse_KN1 - t_KNP.gather(-1, place_KN1)).squeeze(-1)
            difference_KNP = t_KNP.sub_(s_KNP).sub_(t_lse_KN1 - s_lse_KN1)  # log p - log r
            torch.sum(difference_KNP.mul_(p_KNP), dim=-1, out=kl_KQ[ks, rows])
            if not differentiable:
                continue
            if keeps_residual(problem):
                torch.sub(r_KNP, p_KNP, out=saved[ks, rows])
                continue
            residual_KNP = r_KNP.sub_(p_KNP).mul_(scale)
            saved[ks, rows] = torch.bmm(residual_KNP, sd_KPD)
            if rows.start == 0:
                torch.bmm(residual_KNP.mT, sq_KND, out=dsd[ks])
            else:
                dsd[ks].baddbmm_(residual_KNP.mT, sq_KND)
    return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1), saved, dsd


def backward(grad_K: Tensor, problem: Problem, saved: Tensor, dsd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's q and d: dS = g_k / (Q T_s) (R - P), dq = dS d, dd = dS^T q; none of a row_scale."""
    sq, sd, temperature = problem.student[:3]
    weight_K11, none = grad_K.to(saved.dtype)[:, None, None], saved.new_empty(0)
    if not keeps_residual(problem):
        return (saved * weight_K11).to(sq.dtype), (dsd * weight_K11).to(sd.dtype), none
    weight_K11 = weight_K11 / (max(problem.shape[1], 1) * temperature)
    dsq, dsd = saved.new_empty(sq.shape), saved.new_empty(sd.shape)
    for ks in _layer_groups(*problem.shape, at_once=_BACKWARD_SCORES):
        ds_KQP = saved[ks] * weight_K11[ks]
        torch.bmm(ds_KQP, sd[ks].to(ds_KQP.dtype), out=dsq[ks])
        torch.bmm(ds_KQP.mT, sq[ks].to(ds_KQP.dtype), out=dsd[ks])
    return dsq.to(sq.dtype), dsd.to(sd.dtype), none


def _layer_groups(layers: int, queries: int, passages: int, at_once: int) -> Iterator[slice]:
    step = max(1, at_once // max(queries * passages, 1))
    return (slice(k, min(k + step, layers)) for k in range(0, layers, step))


def _row_blocks(queries: int, passages: int) -> Iterator[slice]:
    step = max(_CHUNK_ROWS, _CHUNK_SCORES // max(passages, 1))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def _logsumexp(scores_KNP: Tensor, softmax_KNP: Tensor, place_KN1: Tensor) -> Tensor:
    """[K, N, 1] from a score and its softmax: the target's; the largest where a target's underflows. No GPU is asked."""
    at_KN1 = softmax_KNP.gather(-1, place_KN1)
    if at_KN1.device.type != "cpu" or bool((at_KN1 < _UNDERFLOWS).any()):
        return scores_KNP.amax(-1, keepdim=True) - softmax_KNP.amax(-1, keepdim=True).log()
    return scores_KNP.gather(-1, place_KN1) - at_KN1.log()
