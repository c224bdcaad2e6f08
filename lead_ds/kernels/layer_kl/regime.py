"""When the backward pass may find its score residuals in memory, and when it recomputes them.

A LEAD batch has a few hundred thousand scores: keeping R - P (student minus teacher probability) costs less than
launching their recomputation. At retrieval-training sizes the maps are gigabytes, and only the rows' log-sum-exps are
kept.
"""

import torch

from lead_ds.kernels.dispatch import accumulation_dtype

# 16 MiB of float32.
_STORED_SCORES = 1 << 22


def stores_maps(layers: int, queries: int, passages: int) -> bool:
    """Whether the forward pass keeps maps of [K, Q, P] for the backward pass."""
    return layers * queries * passages <= _STORED_SCORES


def saved_shapes(
    impl: str, layers: int, queries: int, passages: int, differentiable: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that the forward pass saves.

    Where maps are stored: torch keeps the residual [K, Q, P]; Triton keeps both models' scores, [2, K, Q, P] with P
    rounded up, and forms the residual as it reads them, one launch sooner. Log-sum-exps [2, K, Q] wherever the residual
    is still to be formed.
    """
    nothing, lse = (0,), (2, layers, queries)
    if not differentiable:
        return nothing, nothing
    if not stores_maps(layers, queries, passages):
        return nothing, lse
    if impl == "torch":
        return (layers, queries, passages), nothing
    # Rows that start on a 16-element boundary let the kernels read and write several elements at once.
    return (2, layers, queries, -(-passages // 16) * 16), lse


def saved_dtype(teacher: torch.dtype, student: torch.dtype) -> torch.dtype:
    """Dtype of the results and of what is saved."""
    return accumulation_dtype(torch.promote_types(teacher, student))
