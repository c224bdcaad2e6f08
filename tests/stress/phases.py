"""What a forked process is doing, in memory that it shares with the one that forked it: so that a kill can be aimed."""

from __future__ import annotations

import functools
import importlib
import mmap
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

START = "starting"
MOST = 30


class Phases:
    """spots: a phase's name -> the function whose calls are it, as "module:name" or "module:Class.name"."""

    here: ClassVar[Phases | None] = None  # of this process, where it was forked

    def __init__(self, spots: Mapping[str, str]) -> None:
        self.spots, self.names = spots, [START, *spots]
        assert len(self.names) <= MOST
        memory = np.frombuffer(mmap.mmap(-1, 8 * (2 * MOST + 2)), np.float64)
        self._now, self._stage = memory[:1], memory[1:2]
        self._entries, self._seconds = memory[2 : MOST + 2], memory[MOST + 2 :]

    @property
    def now(self) -> str:
        """The phase that the process is in, or was when it ended."""
        return self.names[int(self._now[0])]

    @property
    def stage(self) -> int:
        """The process number of a pipeline's stage; 0: none yet."""
        return int(self._stage[0])

    @stage.setter
    def stage(self, pid: int) -> None:
        self._stage[0] = pid

    def entries(self, name: str) -> int:
        """How often the phase began."""
        return int(self._entries[self.names.index(name)])

    def seconds(self, name: str) -> float:
        """How long it takes, on average."""
        return float(self._seconds[self.names.index(name)]) / max(1, self.entries(name))

    def install(self) -> None:
        """In the forked process: note every call of the functions, which do what they did."""
        Phases.here = self
        for number, spot in enumerate(self.spots.values(), 1):
            module, _, name = spot.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, last = name.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, last, self._noted(getattr(owner, last), number))

    def _noted(self, function: Callable[..., Any], number: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            before, began = self._now[0], time.monotonic()
            self._entries[number] += 1
            self._now[0] = number
            try:
                return function(*arguments, **options)
            finally:
                self._now[0] = before
                self._seconds[number] += time.monotonic() - began

        return call
