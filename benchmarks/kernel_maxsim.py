"""The benchmark of maxsim."""

import torch
from torch import Tensor

from benchmarks.kernel_spec import Ceilings, Inputs, KernelSpec, Shape
from lead_ds.kernels import maxsim
from lead_ds.kernels.maxsim.reference import maxsim_reference
from lead_ds.relevance import TokenFeatures


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Unit vectors, as late-interaction models give them; with `ragged`, masks of random lengths."""
    q = torch.randn(shape["Q"], shape["Lq"], shape["D"], device=device)
    d = torch.randn(shape["P"], shape["Ld"], shape["D"], device=device)
    q, d = (torch.nn.functional.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (q, d))
    tensors = {"q": q, "d": d, "q_mask": None, "d_mask": None}
    if shape.get("ragged"):
        tensors["q_mask"] = _lengths(shape["Q"], shape["Lq"], device)
        tensors["d_mask"] = _lengths(shape["P"], shape["Ld"], device)
    return Inputs(tensors, ("q", "d"), torch.randn(shape["Q"], shape["P"], device=device))


def _lengths(count: int, length: int, device: torch.device) -> Tensor:
    lengths = torch.randint(1, length + 1, (count, 1), device=device)
    return torch.arange(length, device=device) < lengths


def eager(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """What late-interaction training code writes: one einsum, a mask, a maximum, a sum."""
    similarity = torch.einsum("qld,pmd->qplm", q, d)
    if d_mask is not None:
        similarity = similarity.masked_fill(~d_mask[None, :, None, :], -1e4)
    best = similarity.max(dim=-1).values
    if q_mask is not None:
        best = best * q_mask[:, None, :]
    return best.sum(dim=-1)


def in_training(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """As a training step calls it: from token features, whatever their dtype, to relevance."""
    masks = [
        torch.ones(x.shape[:2], device=x.device) if mask is None else mask for x, mask in ((q, q_mask), (d, d_mask))
    ]
    return TokenFeatures(q[None], masks[0], d[None], masks[1]).relevance().logits[0]


def flash_maxsim(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """The flash-maxsim package's trainable form, where installed; it takes lengths for masks."""
    from flash_maxsim import flash_maxsim_batched_train  # type: ignore[import-not-found]

    lengths = [None if mask is None else mask.sum(dim=-1, dtype=torch.int32) for mask in (d_mask, q_mask)]
    return flash_maxsim_batched_train(q, d, True, *lengths)


def late_interaction_kernels(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> Tensor:
    """The late-interaction-kernels package, where installed."""
    from late_interaction_kernels import maxsim as peer  # type: ignore[import-not-found]

    return peer(q, d, q_mask=q_mask, d_mask=d_mask)


def floor(shape: Shape, mode: str, itemsize: int, ceilings: Ceilings) -> float:
    """All similarities once, and for the backward pass at least every input read and every gradient written."""
    flops = 2.0 * shape["Q"] * shape["P"] * shape["Lq"] * shape["Ld"] * shape["D"]
    moved = float(itemsize * shape["D"] * (shape["Q"] * shape["Lq"] + shape["P"] * shape["Ld"]))
    forward = ceilings.floor(flops, moved)
    return forward if mode == "forward" else forward + ceilings.floor(0.0, 2 * moved)


_LATE = {"Q": 64, "P": 512, "Lq": 32, "Ld": 256, "D": 128}
SPECS = (
    KernelSpec(
        name="maxsim",
        shapes={
            "cuda": (
                {"Q": 16, "P": 64, "Lq": 32, "Ld": 128, "D": 128},
                _LATE,
                _LATE | {"ragged": True},
                _LATE | {"D": 768},
                {"Q": 128, "P": 2048, "Lq": 32, "Ld": 256, "D": 128},
            ),
            "cpu": (
                {"Q": 8, "P": 16, "Lq": 32, "Ld": 64, "D": 128},
                {"Q": 16, "P": 64, "Lq": 32, "Ld": 128, "D": 128},
                {"Q": 16, "P": 64, "Lq": 32, "Ld": 128, "D": 128, "ragged": True},
                _LATE,
            ),
        },
        check_shape={"Q": 5, "P": 7, "Lq": 19, "Ld": 70, "D": 48},
        make_inputs=make_inputs,
        reference=maxsim_reference,
        providers={
            "eager": eager,
            "lead-ds": maxsim,
            "lead-ds, as training calls it": in_training,
            "flash-maxsim": flash_maxsim,
            "late-interaction-kernels": late_interaction_kernels,
        },
        floor=floor,
        size=lambda shape: shape["Q"] * shape["P"] * shape["Lq"] * shape["Ld"],
        size_label="similarities",
        graph=frozenset({0}),
    ),
)
