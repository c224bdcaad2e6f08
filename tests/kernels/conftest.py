"""Where the Triton kernels of these tests run: compiled on a CUDA device, else in Triton's interpreter on the CPU."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it has to be set before anything imports triton.
if not HAS_CUDA and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device on which impl="triton" runs here; skips where it cannot."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if HAS_CUDA:
        return torch.device("cuda")
    import triton
    import triton.language as tl

    if isinstance(tl.sum, triton.JITFunction):
        pytest.skip("triton was imported before TRITON_INTERPRET=1 was set; run `pytest tests/kernels` on its own")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def triton_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes kernels can be checked in: the interpreter's bfloat16 product is wrong, so only a GPU checks it."""
    return (torch.float32, torch.float16, torch.bfloat16) if HAS_CUDA else (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every `torch.empty` comes filled with NaN, or the largest integer, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
