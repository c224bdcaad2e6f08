"""Starting a kernel: on the device of its tensors, with what the device refuses reported in one line; and what it was
built of."""

from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from triton import OutOfResources

from lead_ds.kernels.builds import KernelRefused, note_launch

# What a test or a benchmark puts here is called with every kernel, its arguments and its constants, before the launch.
observers: list[Callable[[Any, tuple[Any, ...], dict[str, Any]], None]] = []


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` over `grid` on the device of its tensors, whichever device is the current one.

    Tensors may come in tuples. Raises ValueError where they lie on several devices, and KernelRefused where a block of
    the device has too little shared memory or too few registers.
    """
    tensors = [x for given in arguments for x in (given if isinstance(given, tuple) else (given,))]
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    if len(devices) != 1:
        raise ValueError(f"{kernel.__name__}: tensors on {', '.join(sorted(map(str, devices))) or 'no device'}")
    (device,) = devices
    for observe in observers:
        observe(kernel, arguments, constants)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        start = perf_counter()
        try:
            kernel[grid](*arguments, **constants)
            note_launch(kernel.__name__, perf_counter() - start)
        except OutOfResources as error:
            raise KernelRefused(f"{kernel.__name__} on {device}: {error}; set kernels: torch") from error
