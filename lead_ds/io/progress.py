"""How far a long job is: a bar with the time left where a person watches, a line now and then where a file does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERVAL = 30.0  # seconds between two plain lines


class Progress:
    """Counts to `total`; silent unless `shown`."""

    def __init__(self, what: str, total: int, unit: str, shown: bool) -> None:
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.done = 0
        self.started = self.printed = time.monotonic()
        self._bar: Any = None

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif self.shown and time.monotonic() - self.printed > INTERVAL:
            self.printed = time.monotonic()
            rate = self.done / (self.printed - self.started)
            left = max(self.total - self.done, 0) / rate
            text = f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.0f}/s, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def open(self) -> None:
        """Show the bar, on a terminal."""
        if not self.shown or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self.what, total=self.total)
        self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(what: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Progress]:
    """A `Progress` on stderr for the time of a job."""
    meter = Progress(what, total, unit, shown)
    meter.open()
    try:
        yield meter
    finally:
        meter.close()
