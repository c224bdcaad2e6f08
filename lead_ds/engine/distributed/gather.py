"""Passages of every rank as in-batch negatives, with gradient.

A rank computes the rows of its own queries against the passages of all ranks. Its loss is the mean over its rows, and
the data-parallel mean of the ranks' losses is the global batch's loss. A passage's gradient is then the sum of what all
ranks' rows say of it: `all_gather`'s backward is a reduce-scatter. Gathering without that (keeping only the local slice's
gradient) would make the gradient depend on how the batch is spread over processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.relevance import Features, ScoreFeatures, TokenFeatures, VectorFeatures, pad_tokens

F = TypeVar("F", VectorFeatures, TokenFeatures, ScoreFeatures)


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


def gather_passages(features: Features, ranks: Ranks) -> Features:
    """Features with the passages of all ranks (queries stay the rank's own). Scores of pairs stay as they are."""
    if ranks.world == 1 or isinstance(features, ScoreFeatures):
        return features
    if isinstance(features, VectorFeatures):
        return replace(features, p_KPD=gather_dim(features.p_KPD, 1))
    # Token states: ranks pad to their own longest passage, so agree on the longest of all first.
    longest = torch.tensor([features.p_KPLD.shape[2]], device=features.p_KPLD.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    length = int(longest.item())
    return replace(
        features,
        p_KPLD=gather_dim(pad_tokens(features.p_KPLD, 2, length), 1),
        p_mask_PL=gather_dim(pad_tokens(features.p_mask_PL, 1, length), 0),
    )
