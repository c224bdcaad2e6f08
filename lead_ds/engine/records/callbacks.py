"""Callbacks: what a run reports to Python, and how Python ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import LeadError, RunError


@dataclass(frozen=True)
class RunFacts:
    """What a run is: its folder, the step it starts from (0, or that of a resumed checkpoint), its last step, and who takes part.

    student: the model in training; under ZeRO-3 this process holds a part of its weights only.
    """

    output: Path
    step: int
    steps: int
    rank: int
    processes: int
    student: nn.Module


class Callback:
    """Base of callbacks: override what you need. Return True from any of them to end the run after the step at hand.

    The run then evaluates where it can, writes a checkpoint and exports the student, on every process at the same step.
    Metrics are plain numbers, averaged over processes. Callbacks are called on process 0, or on every process with
    `every_rank = True` (where they take part in collective operations, say). What a callback raises ends the run.

    >>> class Patience(Callback):
    ...     def on_step(self, metrics):
    ...         return metrics["loss"] < 0.1
    >>> Patience().on_step({"step": 10, "loss": 0.05, "lr": 1e-5})
    True
    """

    every_rank = False

    def on_start(self, run: RunFacts) -> bool | None:
        """Before the first step."""

    def on_step(self, metrics: dict[str, Any]) -> bool | None:
        """Of every step: step, loss, lr, the part of each loss by its name, and what else metrics.jsonl has.

        Called once in `train.log_every` steps, for each of these in turn: between, nothing waits for the device.
        """

    def on_evaluation(self, metrics: dict[str, Any]) -> bool | None:
        """After an evaluation: step, and the mean of each measure by its name, such as "nDCG@10"."""

    def on_checkpoint(self, path: Path) -> bool | None:
        """After a checkpoint is complete in the folder `path`."""

    def on_end(self, step: int) -> bool | None:
        """After the last step, before the student is written; not called where the run fails or is interrupted."""


class Callbacks:
    """The callbacks of a run on one process. Every process of the run holds equally many."""

    def __init__(self, callbacks: Sequence[Callback], ranks: Ranks) -> None:
        self.ranks, self.count = ranks, len(callbacks)
        self._mine = [callback for callback in callbacks if ranks.main or callback.every_rank]
        self._stop, self._open = False, False
        self._error: LeadError | None = None

    def tell(self, call: Callable[[Callback], bool | None]) -> None:
        """Call each of this process's callbacks. What one raises is raised by `asked`, on every process."""
        self._open = self.count > 0
        for callback in self._mine:
            try:
                self._stop = bool(call(callback)) or self._stop
            except Exception as error:
                self._error = self._error or _run_error(callback, error)

    def asked(self) -> bool:
        """Whether a callback of any process asked to stop since the last call; every process calls this.

        Raises RunError on every process for what a callback raised.
        """
        if not self._open:
            return False
        own = self._error
        answers = self.ranks.all((self._stop, own))
        self._stop, self._error, self._open = False, None, False
        for _, error in answers:
            if error is not None:
                raise own or error  # its own has the traceback
        return any(stop for stop, _ in answers)


def _run_error(callback: Callback, error: Exception) -> LeadError:
    if isinstance(error, LeadError):
        return error
    what = " ".join(f"{type(error).__name__}: {error}".split())
    failure = RunError(f"callback {type(callback).__name__}", what, "the last checkpoint is intact")
    failure.__cause__ = error
    return failure
