"""Layer-relevance KL in torch, a block of layers and query rows at a time: what a CPU runs.

The gradient comes out of the same visit as the value, for the scores are there anyway: no map is kept, and none is computed
twice. What waits for the backward pass is the gradient itself, which that multiplies by its weight.

Dimensions: K layer pairs, Q queries, P passages, D width (teacher and student each their own), N rows of one block.
"""

from collections.abc import Iterator
from math import e, log2
from typing import Any

import torch
from torch import Tensor

from lead_ds.kernels.layer_kl.inputs import Problem, saved_shapes

# Scores of one map of a block: 2 MiB of float32, so that both models' stay in a core's cache.
_CHUNK_SCORES = 1 << 19
# Fewer rows than this waste the matrix product.
_CHUNK_ROWS = 32
_LOG2_E = log2(e)


def forward(problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kl [K], teacher_nll [K], gradients of the student's q and d for a KL of weight 1, or nothing)."""
    (tq, td, t_temperature, _), (sq, sd, s_temperature, _) = problem.teacher, problem.student
    layers, queries, passages = problem.shape
    new: dict[str, Any] = {"dtype": problem.dtype, "device": sq.device}
    kl_KQ, nll_KQ = torch.empty(layers, queries, **new), torch.empty(layers, queries, **new)
    dsq, dsd = (torch.zeros(shape, **new) for shape in saved_shapes(problem, "torch", differentiable))
    hidden_QP = None if problem.mask is None else (~problem.mask).scatter_(1, problem.target[:, None], False)
    scale = 1 / (max(queries, 1) * s_temperature)
    for ks in _layer_groups(layers, queries, passages):
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
                lse_KN = torch.logsumexp(t_KNP, dim=-1)
                nll_KQ[ks, rows] = lse_KN - t_KNP.gather(-1, place_KN1).squeeze(-1)
                t_KNP.div_(t_temperature)
            if s_temperature != 1.0:
                s_KNP.div_(s_temperature)
            p_KNP, log_r_KNP = torch.log_softmax(t_KNP, dim=-1), torch.log_softmax(s_KNP, dim=-1)
            if t_temperature == 1.0:
                nll_KQ[ks, rows] = -p_KNP.gather(-1, place_KN1).squeeze(-1)
            difference_KNP = torch.sub(p_KNP, log_r_KNP, out=t_KNP)
            _exponential_(p_KNP)
            torch.sum(difference_KNP.mul_(p_KNP), dim=-1, out=kl_KQ[ks, rows])
            if differentiable:
                residual_KNP = _exponential_(log_r_KNP).sub_(p_KNP).mul_(scale)
                dsq[ks, rows] = torch.bmm(residual_KNP, sd_KPD)
                dsd[ks].baddbmm_(residual_KNP.mT, sq_KND)
    return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1), dsq, dsd


def backward(grad_K: Tensor, problem: Problem, dsq: Tensor, dsd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the student's q and d."""
    weight_K11 = grad_K.to(dsq.dtype)[:, None, None]
    return (dsq * weight_K11).to(problem.student.q.dtype), (dsd * weight_K11).to(problem.student.d.dtype)


def _layer_groups(layers: int, queries: int, passages: int) -> Iterator[slice]:
    step = max(1, _CHUNK_SCORES // max(queries * passages, 1))
    return (slice(k, min(k + step, layers)) for k in range(0, layers, step))


def _row_blocks(queries: int, passages: int) -> Iterator[slice]:
    step = max(_CHUNK_ROWS, _CHUNK_SCORES // max(passages, 1))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def _exponential_(x: Tensor) -> Tensor:
    """exp in place, by base 2: torch's exp on a CPU is slow where the result underflows."""
    return x.mul_(_LOG2_E).exp2_()
