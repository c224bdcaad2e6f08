"""Those who started a rank: once one of them has been killed, nobody would end the rank, or see what it says."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lead_ds.errors import RunError

EVERY = 2.0  # seconds
_KNOWN = re.compile(rb"deepspeed[./]launcher|bin/deepspeed\b|torch[./]distributed[./]|torchrun|launch/\w+\.(?:py|sh)\b")
_MARKS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # what DeepSpeed's launcher and torchrun leave with the ranks
REMEDY = "start it again; distill and warmup with --resume"


@contextmanager
def ends_with_launchers() -> Iterator[None]:
    """Within, this process is asked to stop, as by SIGTERM, when one of the launchers above it has gone.

    A process that was started by hand has none: it outlives its shell. Raises RunError where they have gone already.
    """
    above = launchers()
    if not above and os.getppid() == 1 and any(name in os.environ for name in _MARKS):
        raise RunError("launcher", "has gone, and this rank with it", REMEDY)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            gone = [pid for pid, started in above.items() if _process(pid)[1] != started]
            if gone:
                with suppress(OSError):  # who would read it may have gone, too
                    what = f"launcher: process {gone[0]}, which started this rank, has gone: it stops ({REMEDY})"
                    print(f"error: {what}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="lead-ds-launchers", daemon=True)
    if above:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if above:
            thread.join()


def launchers() -> dict[int, str]:
    """The launchers above this process, the nearest first, and when each was started; none where there is no /proc."""
    found: dict[int, str] = {}
    pid = os.getppid()
    while pid and _KNOWN.search(_command(pid)):
        above, started = _process(pid)
        if not started:
            break
        found[pid], pid = started, above
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def _process(pid: int) -> tuple[int, str]:
    """A process's parent, and when it was started, in ticks since boot: "" of one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if fields[0] in "ZX" else (int(fields[1]), fields[19])
