"""How close a kernel has to come to the float64 reference."""

import torch
from torch import Tensor

# Absolute slack for results that eager happens to get exactly right, by the dtype of the inputs.
_SLACK = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_accurate_as_eager(found: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    """The largest error is at most twice that of eager torch in the same dtype, plus rounding of the largest value."""
    assert found.shape == exact.shape, name
    assert torch.isfinite(found).all(), f"{name} is not finite"
    if exact.numel() == 0:
        return
    error = (found.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + _SLACK[dtype] * max(exact.abs().max().item(), 1e-6)
    assert error <= allowed, f"{name}: error {error:.3g} against an allowed {allowed:.3g}"
