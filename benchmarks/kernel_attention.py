"""The benchmarks of attention_kl, head by head and of averaged heads: K layer pairs of a teacher and a student in one call."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_spec import Ceilings, Inputs, KernelSpec, Shape
from lead_ds.kernels import attention_kl
from lead_ds.kernels.attention_kl.inputs import Maps
from lead_ds.kernels.attention_kl.reference import attention_kl_reference


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random queries and keys of every pair ("tq0", "tk0", "sq0", "sk0", "tq1", ...); with `ragged`, a mask of lengths.

    `Hk`: key heads of both models where they are fewer than H.
    """
    batch, length, width = shape["B"], shape["L"], shape["d"]
    key_heads: int = shape["Hk"] if "Hk" in shape else shape["H"]
    tensors: dict[str, Any] = {}
    for k in range(shape["K"]):
        for name in ("tq", "tk", "sq", "sk"):
            heads = key_heads if name[1] == "k" else shape["H"]
            # As a projection gives them: the heads of a token side by side in memory.
            x = torch.randn(batch, length, heads, width, device=device, dtype=dtype).transpose(1, 2)
            tensors[f"{name}{k}"] = x.requires_grad_(name[0] == "s")
    tensors["mask"] = None
    if shape.get("ragged"):
        lengths = torch.randint(1, length + 1, (batch, 1), device=device)
        tensors["mask"] = torch.arange(length, device=device) < lengths
    students = tuple(name for name in tensors if name[0] == "s")
    return Inputs(tensors, students, torch.ones((), device=device))


def columns(tensors: dict[str, Any]) -> list[list[Tensor]]:
    """All tq, all tk, all sq, all sk."""
    return [[x for name, x in tensors.items() if name.startswith(kind)] for kind in ("tq", "tk", "sq", "sk")]


def eager(*, mask: Tensor | None, head_mean: bool = False, **tensors: Tensor) -> Tensor:
    """What a distillation script writes: both maps, log-softmax in float32, their mean or not, kl_div, a masked mean."""
    total = torch.zeros((), device=tensors["sq0"].device)
    pairs = list(zip(*columns(tensors), strict=True))
    for tq, tk, sq, sk in pairs:
        logs = []
        for q, k in ((tq, tk), (sq, sk)):
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
            logs.append(functional.log_softmax(logits, dim=-1, dtype=torch.float32))
            if head_mean:
                tiny = torch.finfo(torch.float32).tiny
                logs[-1] = logs[-1].exp().mean(1, keepdim=True).clamp_min(tiny).log()
        rows = functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
        if mask is None:
            total = total + rows.mean()
        else:
            total = total + (rows * mask[:, None]).sum() / (mask.sum() * rows.shape[1])
    return total / len(pairs)


def lead_ds(*, mask: Tensor | None, head_mean: bool = False, **tensors: Tensor) -> Tensor:
    """The kernel, all pairs in one call."""
    tq, tk, sq, sk = columns(tensors)
    return attention_kl(tq, tk, sq, sk, mask, head_mean=head_mean)


def lead_ds_atomic(*, mask: Tensor | None, **tensors: Tensor) -> Tensor:
    """The kernel with a backward of one launch, where it has one."""
    if not tensors["sq0"].is_cuda:
        raise ImportError("atomics are for CUDA")
    tq, tk, sq, sk = columns(tensors)
    return attention_kl(tq, tk, sq, sk, mask, atomic=True)


def reference(*, mask: Tensor | None, head_mean: bool = False, **tensors: Tensor) -> Tensor:
    """The oracle, pair by pair."""
    pairs = zip(*columns(tensors), strict=True)
    values = [attention_kl_reference(Maps(tq, tk), Maps(sq, sk), mask, head_mean=head_mean) for tq, tk, sq, sk in pairs]
    return torch.stack(values).mean()


def floor(shape: Shape, mode: str, itemsize: int, ceilings: Ceilings) -> float:
    """Every score of both models once and its exponential; with the backward, also the products that give dQ and dK."""
    scores = shape["K"] * shape["B"] * shape["H"] * shape["L"] ** 2
    product = 2.0 * scores * shape["d"]
    tokens = shape["K"] * shape["B"] * shape["L"] * shape["d"]
    vectors = float(itemsize * tokens * (shape["H"] + shape.get("Hk", shape["H"])))
    if mode == "forward":
        return ceilings.floor(2 * product, 2 * vectors, 2.0 * scores)
    return ceilings.floor(4 * product, 3 * vectors, 2.0 * scores)


_BERT = {"K": 6, "B": 32, "H": 12, "L": 512, "d": 64}
_SINGLE = KernelSpec(
    name="attention_kl",
    shapes={
        "cuda": (
            {"K": 6, "B": 32, "H": 12, "L": 128, "d": 64},
            _BERT,
            _BERT | {"ragged": True},
            {"K": 6, "B": 8, "H": 12, "L": 2048, "d": 64},
            {"K": 6, "B": 4, "H": 32, "Hk": 8, "L": 4096, "d": 128},
        ),
        "cpu": (
            {"K": 1, "B": 2, "H": 4, "L": 64, "d": 32},
            {"K": 1, "B": 4, "H": 12, "L": 128, "d": 64},
            {"K": 1, "B": 4, "H": 12, "L": 128, "d": 64, "ragged": True},
            {"K": 1, "B": 8, "H": 12, "L": 1024, "d": 64},
        ),
    },
    check_shape={"K": 2, "B": 3, "H": 4, "Hk": 2, "L": 70, "d": 48, "ragged": True},
    make_inputs=make_inputs,
    reference=reference,
    providers={"eager": eager, "lead-ds": lead_ds, "lead-ds atomic": lead_ds_atomic},
    floor=floor,
    size=lambda shape: shape["K"] * shape["B"] * shape["H"] * shape["L"] ** 2,
    size_label="scores of a model",
    graph=frozenset({0}),
)
_MEAN = replace(
    _SINGLE,
    name="attention_kl_head_mean",
    reference=partial(reference, head_mean=True),
    providers={"eager": partial(eager, head_mean=True), "lead-ds": partial(lead_ds, head_mean=True)},
)
SPECS = (_SINGLE, _MEAN)
