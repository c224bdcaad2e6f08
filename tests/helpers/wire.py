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
import subprocess
import sys
import time
from typing import NamedTuple

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


def shared(file: int) -> memoryview:
    """The numbers that a wire's two processes share: the weather, frames carried, frames dropped."""
    return memoryview(mmap.mmap(file, 8 * (len(CALM) + 2))).cast("d")


class Wire:
    """Two devices, and a process that carries frames between them. Their kernels see two ends of a cable.

    That process is not forked from this one, in which gloo's groups may lie about: to collect one hangs in a fork.
    Raises OSError where there is no /dev/net/tun, or no permission.
    """

    def __init__(self, *names: str) -> None:
        file = os.memfd_create("wire")
        given = [file]
        try:
            os.ftruncate(file, 8 * (len(CALM) + 2))
            self._numbers = shared(file)
            given += [tap(name) for name in names]
            command = [sys.executable, "-I", __file__, *map(str, (os.getpid(), *given))]
            self._carrier = subprocess.Popen(command, pass_fds=given, stderr=subprocess.PIPE, text=True)
        finally:
            for each in given:
                os.close(each)

    def weather(self, now: Weather) -> None:
        """Change what happens to frames from now on."""
        for i, number in enumerate(now):
            self._numbers[i] = number

    @property
    def frames(self) -> tuple[int, int]:
        """How many were carried, and how many dropped."""
        return int(self._numbers[-2]), int(self._numbers[-1])

    def check(self) -> None:
        """Raise AssertionError, with what it last said, where the process has ended."""
        assert self._carrier.poll() is None, self._carrier.communicate()[1]

    def close(self) -> None:
        """End the process; its devices go with it."""
        self._carrier.kill()
        self._carrier.communicate()


def carry(numbers: memoryview, ends: list[int], parent: int) -> None:
    """Carry frames between two devices, in the weather that the first numbers say, while the parent lives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # those of the one that uses it, which still needs it
    dice = random.Random()
    late: list[tuple[float, int, int, bytes]] = []
    count = 0
    while os.getppid() == parent:
        wait = min(1.0, max(0.0, late[0][0] - time.monotonic())) if late else 1.0
        for end in select.select(ends, [], [], wait)[0]:
            other = ends[1 - ends.index(end)]
            try:
                frame = os.read(end, 1 << 16)
            except OSError:  # the device is down
                time.sleep(0.01)
                continue
            now = Weather(*numbers[: len(CALM)])
            if dice.random() < now.drop:
                numbers[-1] += 1
                continue
            for _ in range(1 + (dice.random() < now.twice)):
                count += 1
                due = time.monotonic() + now.late + dice.random() * now.varies
                heapq.heappush(late, (due, count, other, frame))
        while late and late[0][0] <= time.monotonic():
            _, _, other, frame = heapq.heappop(late)
            if numbers[0] >= 1:  # cut since it set out
                numbers[-1] += 1
                continue
            try:
                os.write(other, frame)
                numbers[-2] += 1
            except OSError:  # the device is down, or its queue is full: as on a real one, the frame is lost
                numbers[-1] += 1


if __name__ == "__main__":
    parent_pid, memory, *devices = map(int, sys.argv[1:])
    carry(shared(memory), devices, parent_pid)
