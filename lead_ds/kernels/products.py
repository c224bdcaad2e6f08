"""Products of vectors, and cosines, whose 16-bit inputs stay 16 bits: for matrix instructions, and for what autograd keeps.

A product of two 16-bit numbers is exact in float32, and sums are taken there. Only the gradient is rounded, once, where it
meets the vectors; float16 in a range of its own, which the loss's scale cannot leave.

Dimensions: B of a batch, Q and P vectors that meet, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lead_ds.kernels.vectors import inverse_lengths, through_lengths

_HALF = (torch.float16, torch.bfloat16)


def products(q_BQD: Tensor, p_BPD: Tensor, *, cosine: bool = False) -> Tensor:
    """[B, Q, P] in float32 (float64 for float64 vectors); `cosine` divides by the vectors' lengths, taken in float32.

    >>> products(torch.ones(1, 1, 4), 3 * torch.ones(1, 2, 4)).tolist(), products(*[torch.ones(1, 1, 4)] * 2, cosine=True).item()
    ([[[12.0, 12.0]]], 1.0)
    """
    if q_BQD.dtype in _HALF and q_BQD.dtype == p_BPD.dtype:
        return _Products.apply(q_BQD, p_BPD, cosine)
    dtype = torch.promote_types(torch.promote_types(q_BQD.dtype, p_BPD.dtype), torch.float32)
    q, p = q_BQD.to(dtype), p_BPD.to(dtype)
    if cosine:
        q, p = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(p, dim=-1)
    return torch.bmm(q, p.mT)


def wide_product(a_BMN: Tensor, b_BND: Tensor) -> Tensor:
    """A batched matrix product with a float32 result, of vectors of 16 bits or of 32."""
    if a_BMN.dtype == torch.float32:
        return torch.bmm(a_BMN, b_BND)
    if a_BMN.is_cuda:
        return torch.bmm(a_BMN, b_BND, out_dtype=torch.float32)
    return torch.bmm(a_BMN.float(), b_BND.float())


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor, cosine: bool) -> Tensor:
        scores = wide_product(q, p.mT)
        lengths = (inverse_lengths(q), inverse_lengths(p)) if cosine else ()
        if lengths:
            scores.mul_(lengths[0][..., None]).mul_(lengths[1][..., None, :])
        ctx.save_for_backward(q, p, *lengths)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BQP: Tensor) -> tuple[Tensor | None, ...]:
        q, p, *lengths = ctx.saved_tensors
        grad = grad_BQP * lengths[0][..., None] * lengths[1][..., None, :] if lengths else grad_BQP
        scale = None
        if q.dtype == torch.float16:
            # A power of two, so that scaling there and back is exact; found without waiting for the device.
            scale = torch.exp2(torch.frexp(grad.abs().amax()).exponent.float())
            grad = grad / scale
        grad = grad.to(q.dtype)
        found: list[Tensor | None] = []
        for place, (left, vectors, own) in enumerate(((grad, p, q), (grad.mT, q, p))):
            if not ctx.needs_input_grad[place]:
                found.append(None)
                continue
            wide = wide_product(left, vectors)
            wide = wide if scale is None else wide.mul_(scale)
            found.append(through_lengths(wide, own, lengths[place]) if lengths else wide.to(own.dtype))
        return *found, None
