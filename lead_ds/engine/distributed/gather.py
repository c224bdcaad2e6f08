"""Passages of every rank as in-batch negatives, with gradient.

A rank computes the rows of its own queries against the passages of all ranks. Its loss is the mean over its rows, and
the data-parallel mean of the ranks' losses is the global batch's loss. A passage's gradient is then the sum of what all
ranks' rows say of it: `all_gather`'s backward is a reduce-scatter. Gathering without that (keeping only the local slice's
gradient) would make the gradient depend on how the batch is spread over processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """[...] of every rank -> [W, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        gathered = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather_into_tensor(gathered.view(-1, *x.shape[1:]) if x.dim() else gathered, x)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        if dist.get_backend() == "gloo":
            dist.all_reduce(grad)
            return grad[dist.get_rank()]
        own = torch.empty_like(grad[0])
        dist.reduce_scatter_tensor(own, grad.view(-1, *grad.shape[2:]) if grad.dim() > 2 else grad)
        return own


def gather_dim(x: Tensor, dim: int) -> Tensor:
    """`x` of every rank, joined along `dim` in order of rank; equal shapes on all ranks; carries gradient."""
    gathered = _Gather.apply(x.movedim(dim, 0))
    return gathered.flatten(0, 1).movedim(0, dim)


class AllRanks:
    """Joins what every rank holds of a batch: see `lead_ds.relevance.Gather`."""

    def along(self, x: Tensor, dim: int) -> Tensor:
        return gather_dim(x, dim)

    def largest(self, n: int, device: torch.device) -> int:
        """The largest of every rank's `n`."""
        largest = torch.tensor([n], device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())
