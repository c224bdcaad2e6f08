# mypy: allow-untyped-defs, allow-incomplete-defs
"""One tiny kernel, which shows whether Triton can compile and launch at all."""

import torch
import triton
import triton.language as tl

from lead_ds.kernels.launch import launch


@triton.jit
def add_kernel(x_ptr, BLOCK: tl.constexpr):
    """x + 1 in place."""
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) + 1.0)


def run(device: torch.device) -> None:
    """Raises what the compiler or the driver raises, and RuntimeError where the result is wrong."""
    x = torch.zeros(32, device=device)
    launch(add_kernel, (1,), x, BLOCK=32)
    if not bool((x == 1).all()):
        raise RuntimeError("a kernel ran and gave wrong numbers")
