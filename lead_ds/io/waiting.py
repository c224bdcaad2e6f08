"""Nobody waits in silence: what is waited for is said, with who has it and what to do."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT = 8.0  # seconds after which a wait is reported
AGAIN = 60.0  # seconds until it is reported again


@contextmanager
def told_while_waiting(what: Callable[[], str]) -> Iterator[None]:
    """Say on stderr what the block waits for, when it has lasted WAIT seconds, and each minute from then on.

    what: what it waits for and what to do, found out when it is said.
    """
    over = threading.Event()

    def tell() -> None:
        began, due = time.monotonic(), WAIT
        while not over.wait(due):
            due = AGAIN
            print(f"has waited {time.monotonic() - began:.0f} s for {what()}", file=sys.stderr, flush=True)

    threading.Thread(target=tell, name="lead-ds-told", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def holder(path: Path) -> str:
    """The process of this machine that has locked a file, with its command; "another process" where nobody can tell."""
    try:
        found, status = Path("/proc/locks").read_text(), path.stat()
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        pid = next(line.split()[4] for line in found.splitlines() if place in line.split() and "->" not in line)
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except (OSError, StopIteration, IndexError):
        return "another process"
    return f"process {pid} ({words[:200]})"
