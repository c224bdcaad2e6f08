"""A step in bfloat16, with every call of a kernel written down; run by `launch`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lead_ds.config import load_config
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.training.distill import distill


class Traced(TorchDispatchMode):
    """Notes the dtypes of the floating-point tensors that kernels are handed, and of those that are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[str, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        if name.startswith(("lead_ds.", "c10d.allgather", "c10d._allgather")):
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point())
            self.seen.setdefault(name.removesuffix(".default"), set()).add(dtypes)
        return func(*args, **(kwargs or {}))


def traced(path: str) -> dict[str, list[list[str]]]:
    """The dtypes of every kernel's arguments, in a run of the configuration."""
    with ranks(), Traced() as mode:
        distill(load_config(path), quiet=True)
    return {name: sorted(map(list, dtypes)) for name, dtypes in mode.seen.items()}
