"""When the backward pass may find its score residuals in memory, and when it recomputes them.

A LEAD batch has a few hundred thousand scores: keeping R - P (student minus teacher probability) costs less than
launching their recomputation. At retrieval-training sizes the maps are gigabytes, and only the rows' log-sum-exps are
kept.
"""

import torch

from lead_ds.kernels.dispatch import accumulation_dtype

# 16 MiB of float32.
_STORED_SCORES = 1 << 22


def stores_residual(layers: int, queries: int, passages: int) -> bool:
    """Whether the forward pass keeps the residual map [K, Q, P] for the backward pass."""
    return layers * queries * passages <= _STORED_SCORES


def saved_shapes(
    layers: int, queries: int, passages: int, differentiable: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that the forward pass saves: (residual, nothing), (two log-sum-exps), or nothing."""
    if not differentiable:
        return (0,), (0,)
    if stores_residual(layers, queries, passages):
        return (layers, queries, passages), (0,)
    return (layers, queries), (layers, queries)


def saved_dtype(teacher: torch.dtype, student: torch.dtype) -> torch.dtype:
    """Dtype of the results and of what is saved."""
    return accumulation_dtype(torch.promote_types(teacher, student))
