"""How far each query's scores spread, without their map: what z-scores divide by.

Dimensions: K layers, Q queries, P passages, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lead_ds.kernels.products import products

# Scores of a block: 8 MiB of float32, so that its map stays in a GPU's cache while it is gone over.
_BLOCK_SCORES = 1 << 21


def centred(scores_KQP: Tensor, mask_QP: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores less the mean over each query's unmasked passages [K, Q, P], and their deviation [K, Q, 1], at least 1e-6."""
    keep = torch.ones_like(scores_KQP) if mask_QP is None else mask_QP.to(scores_KQP).expand_as(scores_KQP)
    count = keep.sum(-1, keepdim=True).clamp_min(1)
    around_KQP = scores_KQP - (scores_KQP * keep).sum(-1, keepdim=True) / count
    variance = (around_KQP.square() * keep).sum(-1, keepdim=True) / count
    return around_KQP, variance.clamp_min(1e-12).sqrt()  # clamped inside: the root's gradient at 0 is infinite


def inverse_deviations(q_KQD: Tensor, p_KPD: Tensor, mask_QP: Tensor | None = None) -> Tensor:
    """1 / deviation of each query's inner products with its unmasked passages, [K, Q] in float32, at most 1e6.

    A block of scores is made at a time, and again for the gradient, so that their map [K, Q, P] never is. Below a deviation
    of 1e-5 of the mean, float32 hardly tells scores apart: what is made of them is noise, as it is of their map.

    >>> inverse_deviations(torch.ones(1, 1, 1), torch.tensor([[[-2.0], [2.0]]])).tolist()
    [[0.5]]
    """
    return _InverseDeviations.apply(q_KQD, p_KPD, mask_QP)


def _of_block(q_KND: Tensor, p_KPD: Tensor, mask_NP: Tensor | None) -> Tensor:
    return centred(products(q_KND, p_KPD), mask_NP)[1].squeeze(-1).reciprocal()


def _blocks(q_KQD: Tensor, p_KPD: Tensor) -> Iterator[tuple[slice, slice]]:
    """Layers and queries of each block: several whole layers, or some queries of one."""
    (layers, queries), passages = q_KQD.shape[:2], p_KPD.shape[1]
    at_once = max(1, _BLOCK_SCORES // max(queries * passages, 1))
    rows = max(1, _BLOCK_SCORES // max(passages, 1))
    for k in range(0, layers, at_once):
        for start in range(0, queries, rows):
            yield slice(k, k + at_once), slice(start, start + rows)


class _InverseDeviations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, p, mask)
        found_KQ = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for ks, rows in _blocks(q, p):
            found_KQ[ks, rows] = _of_block(q[ks, rows], p[ks], None if mask is None else mask[rows])
        return found_KQ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KQ: Tensor) -> tuple[Tensor | None, ...]:
        q, p, mask = ctx.saved_tensors
        dq, dp = torch.empty_like(q), torch.zeros_like(p, dtype=grad_KQ.dtype)
        for ks, rows in _blocks(q, p):
            with torch.enable_grad():
                given = q[ks, rows].detach().requires_grad_(), p[ks].detach().requires_grad_()
                found_KN = _of_block(*given, None if mask is None else mask[rows])
                dq[ks, rows], dp_KPD = torch.autograd.grad(found_KN, given, grad_KQ[ks, rows])
            dp[ks] += dp_KPD
        return dq, dp.to(p.dtype), None
