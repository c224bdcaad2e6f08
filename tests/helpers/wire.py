"""A cable into a network namespace that delays, drops or doubles frames, or is cut: for kernels without `tc netem`."""

from __future__ import annotations

import fcntl
import heapq
import mmap
import os
import random
import select
import signal
import struct
import time
from typing import NamedTuple

import numpy as np

DEVICES = "/dev/net/tun"
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # of linux/if_tun.h


class Weather(NamedTuple):
    """What happens to a frame: its chance to be dropped or doubled, seconds that it is late and that this varies by."""

    drop: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    varies: float = 0.0


CALM, CUT = Weather(), Weather(drop=1.0)


def tap(name: str) -> int:
    """Make a device whose frames are read from, and written to, this file."""
    file = os.open(DEVICES, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


class Wire:
    """Two devices, and a process that carries frames between them. Their kernels see two ends of a cable.

    Raises OSError where there is no /dev/net/tun, or no permission.
    """

    def __init__(self, *names: str) -> None:
        self.ends = [tap(name) for name in names]
        memory = np.frombuffer(mmap.mmap(-1, 8 * (len(CALM) + 2)), np.float64)
        self._weather, self._frames = memory[: len(CALM)], memory[len(CALM) :]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._carry()
            finally:
                os._exit(1)
        for file in self.ends:
            os.close(file)

    def weather(self, now: Weather) -> None:
        """Change what happens to frames from now on."""
        self._weather[:] = now

    @property
    def frames(self) -> tuple[int, int]:
        """How many were carried, and how many dropped."""
        return int(self._frames[0]), int(self._frames[1])

    def close(self) -> None:
        """End the process; its devices go with it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _carry(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # those of the one that uses it, which still needs it
        parent, dice = os.getppid(), random.Random()
        late: list[tuple[float, int, int, bytes]] = []
        count = 0
        while os.getppid() == parent:
            wait = min(1.0, max(0.0, late[0][0] - time.monotonic())) if late else 1.0
            for end in select.select(self.ends, [], [], wait)[0]:
                other = self.ends[1 - self.ends.index(end)]
                try:
                    frame = os.read(end, 1 << 16)
                except OSError:  # the device is down
                    time.sleep(0.01)
                    continue
                now = Weather(*self._weather)
                if dice.random() < now.drop:
                    self._frames[1] += 1
                    continue
                for _ in range(1 + (dice.random() < now.twice)):
                    count += 1
                    due = time.monotonic() + now.late + dice.random() * now.varies
                    heapq.heappush(late, (due, count, other, frame))
            while late and late[0][0] <= time.monotonic():
                _, _, other, frame = heapq.heappop(late)
                if self._weather[0] >= 1:  # cut since it set out
                    self._frames[1] += 1
                    continue
                try:
                    os.write(other, frame)
                    self._frames[0] += 1
                except OSError:  # the device is down, or its queue is full: as on a real one, the frame is lost
                    self._frames[1] += 1
