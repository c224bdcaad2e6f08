"""One input: read, or refused in one line, within bounds of memory and processor time, and with nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.fuzz.readers import Reader, feed

LONGEST = 10  # seconds of processor time for one input
ROOM = 1 << 30  # bytes that reading one may add to this process


class TookLong(Exception):
    """An input took longer than LONGEST."""


@contextmanager
def bounds() -> Iterator[None]:
    """Within, what takes more than ROOM is a MemoryError, and what takes more than LONGEST a TookLong."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TookLong(f"more than {LONGEST} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(reader: Reader, content: bytes) -> bool:
    """Feed one input; whether it was read. Nothing may be written outside its folder, nor be left half written."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "a" / "b" / "own"
        folder.mkdir(parents=True)
        before, os.environ["LEAD_DS_CACHE"] = os.environ.get("LEAD_DS_CACHE"), str(folder / "cache")
        try:
            with bounds():
                read = feed(reader, content, folder)
        finally:
            if before is None:
                del os.environ["LEAD_DS_CACHE"]
            else:
                os.environ["LEAD_DS_CACHE"] = before
        outside = [path for path in Path(outer).rglob("*") if folder not in (path, *path.parents) and path.is_file()]
        assert not outside
        assert not [
            path
            for path in folder.rglob("*")
            if path.name.endswith((".tmp", ".owner.json")) and path != folder / ".owner.json"
        ]
        return read
