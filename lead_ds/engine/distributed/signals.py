"""SIGTERM, SIGINT and SIGHUP end a run after its step, with a checkpoint, on all ranks at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import RunError

AGAIN = 2.0  # seconds; launchers send a second signal right after the first, a person does so later


class Interrupted(RunError):
    """The run was asked to stop, and did: status 128 + the signal, as schedulers and shells understand it."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"step {step}", f"stopped by {name}, with a checkpoint", "continue with --resume")
        self.status = 128 + number


class Signals:
    """While open, a first SIGTERM, SIGINT or SIGHUP is only noted, in `received`; SIGINT again means at once.

    SIGHUP comes when a terminal or its connection is lost; under nohup it stays ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        self.since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            noted = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                noted.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT and time.monotonic() - self.since > AGAIN:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.since = number, time.monotonic()


class Stop:
    """Whether any rank was asked to stop: a flag that rides on the all-reduce of each step's statistics.

    On a GPU it is read one step late, when it has long been computed: the device always has the newest step left to do.
    Every rank reads the same flags, so that all stop at the same step.
    """

    def __init__(self, signals: Signals, ranks: Ranks) -> None:
        self.signals, self.ranks = signals, ranks
        self._flags: deque[tuple[Tensor, Any]] = deque(maxlen=2)

    def wish(self) -> float:
        """What this rank adds to the all-reduce."""
        return float(self.signals.received > 0)

    def reduced(self, flag: Tensor) -> None:
        """Take the all-reduced flag of a step, a scalar on the device."""
        if flag.device.type != "cuda":
            self._flags.append((flag, None))
            return
        host = torch.empty((), dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._flags.append((host, event))

    def decided(self, *, now: bool = False) -> bool:
        """Whether to stop after this step; `now` waits for the newest flag, where the device is waited for anyway."""
        if not self._flags:
            return False
        flag, event = self._flags[-1] if now or self._flags[-1][1] is None else self._flags[0]
        if event is not None:
            event.synchronize()
        return bool(flag.item() > 0)

    def interrupted(self, step: int) -> Interrupted:
        """What ends the run, the same on every rank."""
        number = next(n for n in self.ranks.all(self.signals.received) if n)
        return Interrupted(number, step)
