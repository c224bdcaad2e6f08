"""Memory of a benchmark's steps: the CUDA allocator's, or the process's resident set."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

from lead_ds.engine.records.phases import Phase, Phases


class PeakMemory(Phases):
    """The highest memory of each part, above what was there at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase: Phase = "waiting for data"
        self.peaks: dict[str, float] = {}
        return_freed(device)
        settle(device)
        self.base = allocated(device)
        reset_peak(device)

    def at(self, phase: Phase) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), peak(self.device) - self.base)
        reset_peak(self.device)
        self.phase = phase

    @contextlib.contextmanager
    def inside(self, phase: Phase) -> Any:
        around = self.phase
        self.at(phase)
        yield
        self.at(around)


def allocated(device: torch.device) -> float:
    """Bytes of tensors on a GPU; the process's resident ones elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak(device: torch.device) -> float:
    """The highest `allocated` since the last `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Begin another peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def settle(device: torch.device) -> None:
    """Give back what is free, so that the resident memory is what is used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def return_freed(device: torch.device) -> None:
    """From now on, blocks over 64 KiB go back to the system once freed. It costs time: not before a measurement of that."""
    if device.type != "cuda":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))
