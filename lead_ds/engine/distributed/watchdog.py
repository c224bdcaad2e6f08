"""Names the rank that hangs, and where, and ends the job: at a collective's own timeout nobody would know whom to blame."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.distributed.signals import Signals

GRACE = 20.0  # seconds a stopping run may stand still: its launcher is ending it because another rank is gone


class Watchdog:
    """Two threads of each rank: one posts where the rank is to the ranks' common store, one notices when it stands still.

    All ranks pass the same places in the same order. So of those that stand still, the one to blame does not answer:
    its process is frozen, or its machine is gone. Or it has passed fewer places, or is not in the collective the others
    are in.
    """

    def __init__(self, ranks: Ranks, minutes: float, folder: Path, signals: Signals) -> None:
        self.ranks, self.limit, self.folder, self.signals = ranks, minutes * 60, folder, signals
        self.interval = min(10.0, max(0.2, self.limit / 8)) if minutes else 10.0
        self.count, self.place, self.watched = 0, "loading data and models", True
        self.moved, self.longest = time.monotonic(), 0.0
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: Any = None

    def __enter__(self) -> Watchdog:
        if self.limit and self.ranks.world > 1:
            store = dist.distributed_c10d._get_default_store()
            # A connection of its own: on the common one, a wait of the main thread would block ours.
            self._store = dist.PrefixStore("lead-ds/watchdog", store.clone() if hasattr(store, "clone") else store)
            self._threads.append(threading.Thread(target=self._post, name="lead-ds-post", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name="lead-ds-watch", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2)

    def at(self, place: str, *, watched: bool = True) -> None:
        """The rank comes to a place; `watched=False` for one whose length nobody can foresee."""
        now = time.monotonic()
        if self.watched:
            self.longest = max(self.longest, now - self.moved)
        self.count, self.place, self.watched, self.moved = self.count + 1, place, watched, now

    def _post(self) -> None:
        tick = 0
        while not self._closed.is_set():
            tick += 1
            try:
                self._store.set(str(self.ranks.rank), json.dumps(self._entry(tick)))
            except (RuntimeError, OSError):  # rank 0 has gone, with the store: its launcher ends us
                return
            self._closed.wait(self.interval)

    def _entry(self, tick: int) -> dict[str, Any]:
        return {
            "tick": tick,
            "count": self.count,
            "place": self.place,
            "collective": collective(self._main),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.interval)):
            still = time.monotonic() - self.moved
            stopping = self.signals.received
            if stopping and self.watched:
                waited = min(still, time.monotonic() - self.signals.since)
                if waited > max(GRACE, 2 * self.longest):
                    tell(
                        f"{self.place}: stood still for {waited:.0f} s after a signal to stop (continue with --resume)"
                    )
                    os._exit(128 + stopping)
            if self.limit and self.watched and still > self.limit:
                self._judge(still)

    def _judge(self, still: float) -> None:
        """Say who hangs and end this process; return where it moved on meanwhile."""
        count = self.count
        before = self._everyone()
        # Long enough for every living rank to post again.
        self._closed.wait(2.5 * self.interval)
        after = self._everyone()
        if self._closed.is_set() or self.count != count:
            return
        if self._first():
            where = verdict(before, after, self.ranks.rank)
            tell(f"watchdog: no progress for {still:.0f} s: {where} (end what blocks it and continue with --resume)")
        try:
            with (self.folder / f"watchdog-rank-{self.ranks.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:
            tell(f"watchdog: no traceback could be written: {error}")
        os._exit(1)

    def _everyone(self) -> dict[int, dict[str, Any] | None] | None:
        """Every rank's last entry; None where the store itself does not answer."""
        if self._store is None:
            return {0: self._entry(time.monotonic_ns())}
        found: dict[int, dict[str, Any] | None] = {}

        def read() -> None:
            for rank in range(self.ranks.world):
                key = str(rank)
                found[rank] = json.loads(self._store.get(key)) if self._store.check([key]) else None

        return found if self._in_time(read) and len(found) == self.ranks.world else None

    def _first(self) -> bool:
        """Whether this rank is the first to report, so that one does; every rank where the store does not answer."""
        if self._store is None:
            return True
        answer: list[int] = []
        self._in_time(lambda: answer.append(self._store.add("told", 1)))
        return not answer or answer[0] == 1

    def _in_time(self, act: Any) -> bool:
        def attempt() -> None:
            try:
                act()
                done.set()
            except (RuntimeError, OSError):
                return  # as if it had not answered

        done = threading.Event()
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(timeout=max(2.0, self.interval))
        return done.is_set()


def verdict(
    before: dict[int, dict[str, Any] | None] | None, after: dict[int, dict[str, Any] | None] | None, own: int
) -> str:
    """Who hangs, by two readings of every rank's entry: see `Watchdog`."""
    if before is None or after is None:
        return f"rank 0, which the ranks meet at, does not answer rank {own}"
    missing = [rank for rank, entry in after.items() if entry is None]
    if missing:
        return f"rank {missing[0]} has never answered"
    now = {rank: entry for rank, entry in after.items() if entry is not None}
    frozen = [rank for rank in now if now[rank]["tick"] == (before[rank] or {}).get("tick")]
    least = min(entry["count"] for entry in now.values())
    behind = [rank for rank in now if now[rank]["count"] == least]
    if frozen:
        blamed, how = frozen, "does not answer, last seen in"
    elif len(behind) < len(now):
        blamed, how = behind, "hangs in"
    else:
        apart = [rank for rank in now if now[rank]["collective"] is None]
        blamed, how = (apart, "hangs in") if 0 < len(apart) < len(now) else (list(now), "stands still in")
    others = [rank for rank in now if rank not in blamed]
    told = "; ".join(_where(rank, now[rank], how) for rank in blamed[:4])
    return told + (f"; {_where(others[0], now[others[0]], 'waits in')}" if others else "")


def _where(rank: int, entry: dict[str, Any], how: str) -> str:
    inside = f", {entry['collective']}" if entry["collective"] else ""
    return f"rank {rank} (process {entry['pid']} on {entry['host']}) {how} {entry['place']}{inside}"


def collective(thread: int) -> str | None:
    """The collective operation that a thread is in, by its Python frames; None outside of any."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.endswith("distributed_c10d.py") and not frame.f_code.co_name.startswith("_"):
            name = frame.f_code.co_name
            if name != "wrapper":
                return name
        frame = frame.f_back
    return None


def tell(line: str) -> None:
    """One line to stderr, past any buffering: the process is about to end."""
    os.write(2, f"error: {line}\n".encode())
