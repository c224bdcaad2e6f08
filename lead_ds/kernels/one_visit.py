"""A value whose gradient is found in the same visit of the maps: the backward only scales it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class OneVisit(torch.autograd.Function):
    """apply(visit, *students): visit() gives the value, a scalar or [K], and its gradients to the students, in order.

    Of [K] values each has an equal share of the students, in order. Where no gradient is wanted there are none.
    """

    @staticmethod
    def forward(ctx: Any, visit: Callable[[], tuple[Tensor, Sequence[Tensor]]], *students: Tensor) -> Tensor:
        value, gradients = visit()
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [student.dtype for student in students]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights = grad.reshape(-1)
        share = len(ctx.dtypes) // len(weights)
        return None, *(
            (gradient * weights[i // share].to(gradient.dtype)).to(dtype)
            for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        )
