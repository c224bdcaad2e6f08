"""Which implementation runs: the one place where `impl="auto" | "triton" | "torch"` is decided."""

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from lead_ds.kernels.builds import KernelRefused, interpreted

if TYPE_CHECKING:
    import torch

Tiles = TypeVar("Tiles")
Result = TypeVar("Result")

# Kernels that a device refused in this process, and why.
_REFUSED: dict[str, str] = {}

IMPLEMENTATIONS = ("auto", "triton", "torch")

# Shared memory of a block, which is what bounds a tile: of H100, H200 and B200; of A100; of Ada and of consumer Blackwell
# (sm_86, sm_89, sm_120); of AMD's CDNA (gfx942).
HOPPER, AMPERE, ADA, CDNA = 227 << 10, 163 << 10, 99 << 10, 64 << 10
# B200 has as much as Hopper, and sums that do not lie in registers: a key of its own, for tables that care.
BLACKWELL = HOPPER + 1

# Ampere is the first architecture with the bfloat16 tensor cores and asynchronous copies that the kernels are built on.
_OLDEST_CAPABILITY = (8, 0)


def resolve(impl: str, *tensors: "torch.Tensor", kernel: str) -> Literal["triton", "torch"]:
    """The implementation that runs `kernel` on these floating-point `tensors`.

    "auto" is Triton when it is installed and has built and run a first kernel on the device (`probe`), and every tensor
    is a float32, float16 or bfloat16 CUDA tensor. Else it is torch. "triton" requested by name is refused with the
    reason when it cannot run; on CPU tensors it runs only in Triton's interpreter (TRITON_INTERPRET=1).

    Raises ValueError for an unknown `impl`, or for "triton" where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{kernel}: unknown impl {impl!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    # The interpreter is a debugging aid, hundreds of times slower than torch: "auto" must not fall into it by accident.
    if impl == "torch" or (impl == "auto" and not all(tensor.is_cuda for tensor in tensors)):
        return "torch"
    obstacle = _obstacle(tensors) or _REFUSED.get(kernel)
    if obstacle is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"{kernel}: impl='triton' cannot run here: {obstacle}")
    return "torch"


def with_fallback(run: Callable[[str], Result], impl: str, chosen: str, *, kernel: str) -> Result:
    """`run(chosen)`, or `run("torch")`, with a warning, where "auto" chose a kernel that then asks too much of the device.

    Where it chose Triton, `run` is given "auto", by which the backward pass knows that it may fall back as well. `kernel` is
    not tried again in this process. Where "triton" was requested by name, the kernel's error is raised.
    """
    if chosen != "triton" or impl != "auto":
        return run(chosen)
    return unless_refused(lambda: run("auto"), lambda: run("torch"), impl, kernel=kernel)


def unless_refused(run: Callable[[], Result], instead: Callable[[], Result], impl: str, *, kernel: str) -> Result:
    """`run()`; for "auto" `instead()`, with a warning, where the kernel asks too much of the device."""
    if impl != "auto":
        return run()
    try:
        return run()
    except KernelRefused as error:
        _REFUSED[kernel] = str(error)
        warnings.warn(f"{kernel} runs on torch: {error}", stacklevel=4)
        return instead()


def float32_dot_precision() -> Literal["ieee", "tf32"]:
    """The `input_precision` of a float32 `tl.dot`: what the user chose for torch's own float32 products.

    Read by the newer of torch's two interfaces where there is one: once a user has set that, reading the older raises.
    """
    import torch

    for owner in (torch.backends.cuda.matmul, torch.backends):
        chosen = getattr(owner, "fp32_precision", None)
        if chosen not in (None, "none"):
            return "tf32" if chosen == "tf32" else "ieee"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def accumulation_dtype(dtype: "torch.dtype") -> "torch.dtype":
    """The dtype that sums, softmaxes and results are held in: float64 for float64 inputs, else float32."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def shared_memory(tensor: "torch.Tensor") -> int:
    """The key of the tables of tiles: bytes of shared memory that one block may have on the tensor's device."""
    return _shared_memory(tensor.get_device()) if tensor.is_cuda else HOPPER


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
    device = tensors[0].get_device()
    if torch.version.hip is None and _capability(device) < _OLDEST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return probe("cuda", device).obstacle


class Probe(NamedTuple):
    """Whether Triton compiles and launches on a device: why not (None: it does), and how many seconds that took to find."""

    obstacle: str | None
    seconds: float


@lru_cache(maxsize=64)
def probe(kind: str = "cuda", index: int | None = None) -> Probe:
    """Build and run one tiny kernel on a device, once a process: a compiler, headers or a driver may be missing.

    What it finds is one line; "auto" then runs on torch, and prints so.
    """
    import torch

    start = perf_counter()
    try:
        from lead_ds.kernels.probe import run

        run(torch.device(kind) if index is None else torch.device(kind, index))
        obstacle = None
    except Exception as error:  # whatever a tool chain may raise
        lines = str(error).strip().splitlines() or [""]
        obstacle = f"Triton cannot compile and launch a kernel here: {type(error).__name__}: {lines[-1][:200]}"
        warnings.warn(f"kernels run on torch: {obstacle}", stacklevel=2)
    return Probe(obstacle, perf_counter() - start)


def probe_seconds(device: "torch.device") -> float:
    """How long it took to find out whether Triton runs on a device."""
    return probe(device.type, device.index).seconds


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


@lru_cache(maxsize=64)
def _shared_memory(device: int) -> int:
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and properties.major == 10:
        return BLACKWELL
    return int(getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block)


def tiles_for(table: dict[int, Tiles], shared: int) -> Tiles:
    """The entry of a table of tiles for so much shared memory a block: the largest that needs no more, else the smallest."""
    known = sorted(table)
    return table[max((key for key in known if key <= shared), default=known[0])]
