"""The benchmark of layer_kl."""

import torch
from torch import Tensor

from benchmarks.kernel_spec import Ceilings, Inputs, KernelSpec, Shape
from lead_ds.kernels import Factors, factors_kl
from lead_ds.kernels.layer_kl.inputs import stores_maps
from lead_ds.kernels.layer_kl.reference import layer_kl_reference
from lead_ds.losses.divergence import relevance_kl
from lead_ds.relevance import VectorFeatures


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Vectors whose inner products have a standard deviation of one."""
    layers, queries, passages, width = (shape[key] for key in "KQPD")

    def vectors(count: int) -> Tensor:
        return (torch.randn(layers, count, width, device=device) * width**-0.25).to(dtype)

    tensors = {
        "tq": vectors(queries),
        "td": vectors(passages),
        "sq": vectors(queries).requires_grad_(),
        "sd": vectors(passages).requires_grad_(),
        "target": torch.randint(0, passages, (queries,), device=device),
    }
    return Inputs(tensors, ("sq", "sd"), torch.rand(layers, device=device))


def eager(tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, target: Tensor) -> Tensor:
    """One batched product a side over all layers, as torch users write it; the NLL is part of the work."""
    t, s = torch.bmm(tq, td.mT).float(), torch.bmm(sq, sd.mT).float()
    log_p, log_r = t.log_softmax(dim=-1), s.log_softmax(dim=-1)
    nll = -log_p.gather(-1, target.expand(t.shape[0], -1)[..., None]).mean(dim=(1, 2))
    return (log_p.exp() * (log_p - log_r)).sum(dim=-1).mean(dim=-1) + 0 * nll


def ours(tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, target: Tensor) -> Tensor:
    """The KL; the NLL comes with it."""
    return factors_kl(Factors(tq, td), Factors(sq, sd), target)[0]


def in_training(tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, target: Tensor) -> Tensor:
    """As a training step calls it: from the features of both models, whatever their dtype, to the KL."""
    return relevance_kl(VectorFeatures(tq, td).relevance(), VectorFeatures(sq, sd).relevance(), target)[0]


def reference(tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, target: Tensor) -> Tensor:
    """The KL of the oracle."""
    return layer_kl_reference(Factors(tq, td), Factors(sq, sd), target)[0]


def floor(shape: Shape, mode: str, itemsize: int, ceilings: Ceilings) -> float:
    """Two score maps forward; backward two products of the residual, and the maps again where they are too large to keep."""
    layers, queries, passages, width = (shape[key] for key in "KQPD")
    one_map = 2.0 * layers * queries * passages * width
    moved = float(itemsize * layers * (queries + passages) * width)
    exponentials = 2.0 * layers * queries * passages
    forward = ceilings.floor(2 * one_map, 2 * moved, exponentials)
    products = 2 if stores_maps(layers, queries, passages) else 4
    return forward if mode == "forward" else forward + ceilings.floor(products * one_map, 3 * moved, exponentials)


SPECS = (
    KernelSpec(
        name="layer_kl",
        shapes={
            "cuda": (
                {"K": 6, "Q": 64, "P": 512, "D": 768},
                {"K": 6, "Q": 256, "P": 2048, "D": 768},
                {"K": 6, "Q": 1024, "P": 8192, "D": 768},
                {"K": 6, "Q": 4096, "P": 32768, "D": 768},
            ),
            "cpu": (
                {"K": 6, "Q": 16, "P": 128, "D": 384},
                {"K": 6, "Q": 64, "P": 512, "D": 768},
                {"K": 6, "Q": 256, "P": 2048, "D": 384},
                {"K": 6, "Q": 1024, "P": 8192, "D": 384},
            ),
        },
        check_shape={"K": 2, "Q": 19, "P": 70, "D": 48},
        make_inputs=make_inputs,
        reference=reference,
        providers={"eager": eager, "lead-ds": ours, "lead-ds, as training calls it": in_training},
        floor=floor,
        size=lambda shape: shape["K"] * shape["Q"] * shape["P"],
        size_label="scores",
        graph=frozenset({0}),
    ),
)
