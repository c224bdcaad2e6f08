"""Where the time of a step goes: a clock that the training loop notifies of what it is about to do. The default does
nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch

# In the order of a step. Communication: the gathers between the models; ZeRO's own are inside of the models' phases.
Phase = Literal[
    "waiting for data",
    "teacher forward",
    "student forward",
    "communication",
    "losses",
    "backward",
    "optimizer",
    "statistics",
    "evaluation",
    "checkpoint",
]


class Phases:
    """What the loop reports: the phase that begins, and the end of a step. Here nothing is done, and it costs
    nothing."""

    def at(self, phase: Phase) -> None:
        """`phase` begins, and the one before it ends."""

    def inside(self, phase: Phase) -> AbstractContextManager[None]:
        """`phase` lasts as long as this is open; then the one around it goes on."""
        return nullcontext()

    def end_step(self) -> None:
        """The phase that just began is the next step's."""

    def close(self) -> None:
        """The run has ended well. Every rank calls this."""


class PhaseClock(Phases):
    """Keeps a time stamp of every beginning: what lies between two belongs to the first one's phase, so phases add up to
    the step. On CUDA the stamps are events of the current stream, read at the end: the loop never waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phase: Phase = "waiting for data"
        self.marks: list[tuple[Phase, Any]] = []
        self.bounds = [0]  # of steps: each one's first mark

    def at(self, phase: Phase) -> None:
        self.phase = phase
        self.marks.append((phase, self._now()))

    @contextmanager
    def inside(self, phase: Phase) -> Iterator[None]:
        around = self.phase
        self.at(phase)
        try:
            yield
        finally:
            self.at(around)

    def end_step(self) -> None:
        self.bounds.append(len(self.marks) - 1)

    def restart(self) -> None:
        """Forget everything: a step begins now."""
        self.marks, self.bounds = [], [0]
        self.at("waiting for data")

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each phase, of every ended step. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = []
        for first, last in zip(self.bounds, self.bounds[1:], strict=False):
            spent: dict[str, float] = {}
            for (phase, begin), (_, end) in zip(self.marks[first:last], self.marks[first + 1 : last + 1], strict=True):
                spent[phase] = spent.get(phase, 0.0) + self._between(begin, end)
            steps.append(spent)
        return steps

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin


def ordered(phases: dict[str, float]) -> dict[str, float]:
    """The same in the order of a step."""
    return {name: phases[name] for name in get_args(Phase) if name in phases}


def mean_phases(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean over steps of each phase, so that they add up to the mean step."""
    names = {name for step in steps for name in step}
    return ordered({name: sum(step.get(name, 0.0) for step in steps) / len(steps) for name in names})
