"""Steps of a run with every operation written down that a GPU would be waited for, or whose sums have no fixed order."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lead_ds.config import load_config
from lead_ds.engine.distributed.gather import AllRanks
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.training.distill import distill
from lead_ds.engine.training.loop import Training
from tests.engine.jobs import losses_of

# Operations whose result's value or size the host needs.
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "_unique",
    "masked_select",
    "is_nonzero",
    "equal",
    "repeat_interleave.Tensor",
)
# Those of a text model that know no fixed order on CUDA, by torch.use_deterministic_algorithms.
UNORDERED = ("put_", "histc", "bincount", "median", "kthvalue", "scatter_reduce", "_embedding_bag", "ctc_loss")


class Steps(TorchDispatchMode):
    """Notes such operations, with the file that asked for them, from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.waits, self.unordered = False, set[str](), set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.on:
            name = str(func).removeprefix("aten.")
            by_truth = name.startswith("index.") and any(x is not None and x.dtype == torch.bool for x in args[1])
            if name.startswith(WAITS) or by_truth:
                self.waits.add(f"{name} in {_asked_by()}")
            in_order = name.startswith("scatter_reduce") and "amax" in args
            sums_floats = name.startswith("cumsum") and args[0].is_floating_point()
            if (name.startswith(UNORDERED) and not in_order) or sums_floats:
                self.unordered.add(f"{name} in {_asked_by()}")
        return func(*args, **(kwargs or {}))


def unasked(configs: list[str]) -> list[list[float]]:
    """The losses of runs in which ranks may not ask a GPU how long the longest passage is."""

    def largest(*given: Any) -> int:
        raise AssertionError("a GPU would be waited for")

    AllRanks.largest = largest  # type: ignore[method-assign]
    with ranks():
        return [losses_of(distill(load_config(path), quiet=True).parent) for path in configs]


def _asked_by() -> str:
    """The nearest file of the stack that is neither torch's nor this one."""
    frames = [x.filename for x in traceback.extract_stack() if "/torch/" not in x.filename and x.filename != __file__]
    return frames[-1]


def watched(configs: list[str]) -> list[dict[str, Any]]:
    """What the steps of each configuration's run asked for, and the attention backends that its checkpoint keeps."""
    found = []
    optimize = Training.optimize
    with ranks(), Steps() as mode:

        def step(self: Training, *arguments: Any) -> None:
            mode.on = self.step > 0 and torch.are_deterministic_algorithms_enabled()
            try:
                optimize(self, *arguments)
            finally:
                mode.on = False

        Training.optimize = step  # type: ignore[method-assign]
        for path in configs:
            config = load_config(path)
            mode.waits.clear()
            mode.unordered.clear()
            distill(config, quiet=True)
            state = json.loads(next(Path(config.output).glob("checkpoints/*/state.json")).read_text())
            found.append(
                {
                    "waits": sorted(mode.waits),
                    "unordered": sorted(mode.unordered),
                    "attention": state["attention"],
                    "still": torch.are_deterministic_algorithms_enabled(),
                }
            )
    return found
