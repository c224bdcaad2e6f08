"""Which implementation runs: the one place where `impl="auto" | "triton" | "torch"` is decided."""

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import torch

Tiles = TypeVar("Tiles")

IMPLEMENTATIONS = ("auto", "triton", "torch")

# Ampere is the first architecture with the bfloat16 tensor cores and asynchronous copies that the kernels are built on.
_OLDEST_CAPABILITY = (8, 0)


def resolve(impl: str, *tensors: "torch.Tensor", kernel: str) -> Literal["triton", "torch"]:
    """The implementation that runs `kernel` on these floating-point `tensors`.

    "auto" is Triton when it is installed and every tensor is a float32, float16 or bfloat16 CUDA tensor, else torch.
    "triton" asked for by name is refused with the reason when it cannot run; on CPU tensors it runs only in Triton's
    interpreter (TRITON_INTERPRET=1).

    Raises ValueError for an unknown `impl`, or for "triton" where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{kernel}: unknown impl {impl!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    # The interpreter is a debugging aid, hundreds of times slower than torch: "auto" must not fall into it by accident.
    if impl == "torch" or (impl == "auto" and not all(tensor.is_cuda for tensor in tensors)):
        return "torch"
    obstacle = _obstacle(tensors)
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"{kernel}: impl='triton' cannot run here: {obstacle}")
    return "torch"


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def float32_dot_precision() -> Literal["ieee", "tf32"]:
    """The `input_precision` of a float32 `tl.dot`: what the user asked of torch's own float32 products."""
    import torch

    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def accumulation_dtype(dtype: "torch.dtype") -> "torch.dtype":
    """The dtype that sums, softmaxes and results are held in: float64 for float64 inputs, else float32."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def architecture(tensor: "torch.Tensor") -> int:
    """Compute capability as two digits (90 for Hopper), the key of the tables of tiles; 90 in the interpreter."""
    if not tensor.is_cuda:
        return 90
    major, minor = _capability(tensor.get_device())
    return major * 10 + minor


def processor_count(tensor: "torch.Tensor") -> int:
    """Streaming multiprocessors of the tensor's device; 4 in the interpreter, where every program runs in turn."""
    return _processor_count(tensor.get_device()) if tensor.is_cuda else 4


def _obstacle(tensors: tuple["torch.Tensor", ...]) -> str | None:
    import torch

    if not _has_triton():
        return "the triton package is not installed"
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"no kernel for {str(tensor.dtype).removeprefix('torch.')} tensors"
    on_cuda = [tensor.is_cuda for tensor in tensors]
    if not all(on_cuda):
        if any(on_cuda):
            return "the tensors are on different devices"
        if not interpreted():
            return "the tensors are on the CPU; move them to a CUDA device, or set TRITON_INTERPRET=1 to interpret"
        return None
    if torch.version.hip is None and _capability(tensors[0].get_device()) < _OLDEST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=64)
def _capability(device: int) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _processor_count(device: int) -> int:
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tiles_for(table: dict[int, Tiles], capability: int) -> Tiles:
    """The entry of a per-architecture table for this capability: the newest that is not newer, else the oldest."""
    known = sorted(table)
    return table[max((key for key in known if key <= capability), default=known[0])]
