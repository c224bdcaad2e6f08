"""What the kernel benchmark needs to know of a kernel: one `KernelSpec` each, in a module of its own.

A module named in `benchmarks.kernels.SPEC_MODULES` exposes `SPECS`, a tuple of `KernelSpec`. Nothing in the runner knows a
kernel: a new one is a new module.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, and which of them receive gradients.

    `tensors` is passed to providers by name; `weight` is the gradient of their output.
    """

    tensors: dict[str, Any]
    differentiable: tuple[str, ...]
    weight: Tensor


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: matrix products (FLOP/s), memory (bytes/s), base-2 exponentials (1/s)."""

    flops: float
    bandwidth: float
    exp2: float

    def floor(self, flops: float, moved: float, exponentials: float = 0.0) -> float:
        """Seconds below which no implementation can go when the three kinds of work overlap perfectly."""
        return max(flops / self.flops, moved / self.bandwidth, exponentials / self.exp2)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel.

    shapes: "cuda" and "cpu" problems in order of size (the plot's axis); the first of each is what `--quick` runs.
    check_shape: an awkward small problem on which every provider is compared with `reference` in float64 before timing.
    make_inputs(shape, dtype, device): random inputs.
    reference: the oracle, differentiable, any dtype; called as reference(**tensors).
    providers: name -> callable(**tensors) -> the differentiable output (one tensor). The runner adds "torch.compile" from
        the provider named "eager". A provider may raise ImportError: it is then listed as absent.
    floor(shape, mode, itemsize, ceilings): seconds; mode is "forward" or "forward+backward".
    size(shape): the number on the plot's axis, with `size_label`.
    graph: shapes (by position) so small that launches decide: on CUDA they are also timed under a CUDA graph.
    """

    name: str
    shapes: dict[str, tuple[Shape, ...]]
    check_shape: Shape
    make_inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    reference: Callable[..., Tensor]
    providers: dict[str, Callable[..., Tensor]]
    floor: Callable[[Shape, str, int, Ceilings], float]
    size: Callable[[Shape], float]
    size_label: str
    graph: frozenset[int] = field(default=frozenset())
