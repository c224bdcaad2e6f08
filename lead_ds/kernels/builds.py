"""What building and starting kernels leaves to be reported; without torch and Triton, for what must load without them."""

import os

# Launches that took so many seconds were builds: what was built, and how long that took, until it is reported.
BUILD_SECONDS = 0.1
_BUILT: list[tuple[str, float]] = []


class KernelRefused(RuntimeError):
    """A kernel that this device cannot run: it needs more shared memory or registers than a block may have."""


def note_launch(kernel: str, seconds: float) -> None:
    """Take in how long a launch took, on the host."""
    if seconds > BUILD_SECONDS and not interpreted():
        _BUILT.append((kernel, seconds))


def take_builds() -> str | None:
    """The kernels that were built since this was last asked, in one line; None where there were none."""
    built = [f"{kernel} {seconds:.1f} s" for kernel, seconds in _BUILT]
    _BUILT.clear()
    return f"built {len(built)} kernel(s): {', '.join(built)}" if built else None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
