"""Names the rank that hangs, and where, and ends the job: at a collective's own timeout nobody would know whom to blame."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lead_ds.doctor.locks import open_files
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.distributed.signals import Signals
from lead_ds.engine.distributed.waits import collective, compiling, issued, lock_file
from lead_ds.io.waiting import AGAIN, WAIT

GRACE = 20.0  # seconds a stopping run may stand still: its launcher is ending it because another rank is gone


class Watchdog:
    """Two threads of each rank: one posts where the rank is to the ranks' common store, one notices when it stands still.

    All ranks pass the same places in the same order. So of those that stand still, the one to blame does not answer:
    its process is frozen, or its machine is gone. Or it has passed fewer places, or is not in the
    collective that the others are in. Or it has issued fewer collectives between two places: NCCL's return at once, and the
    host then waits anywhere.
    """

    def __init__(
        self, ranks: Ranks, minutes: float, folder: Path, signals: Signals, *, place: str = "loading data and models"
    ) -> None:
        self.ranks, self.limit, self.folder, self.signals = ranks, minutes * 60, folder, signals
        self.interval = min(10.0, max(0.2, self.limit / 8)) if minutes else 10.0
        self.count, self.place, self.watched, self._key = 0, place, True, "lead-ds/watchdog"
        self.moved, self.longest = time.monotonic(), 0.0
        # For what, after how many collectives, since when, and until when it is not reported.
        self._waits: tuple[str | None, int, float, float] = None, 0, 0.0, 0.0
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: Any = None

    def __enter__(self) -> Watchdog:
        if self.ranks.world > 1:
            store = dist.distributed_c10d._get_default_store()
            # A connection of its own: on the common one, a wait of the main thread would block ours.
            self._store = dist.PrefixStore(self._key, store.clone() if hasattr(store, "clone") else store)
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
            self._closed.wait(self.interval if self.count else min(2.0, self.interval))

    def _entry(self, tick: int) -> dict[str, Any]:
        return {
            "tick": tick,
            "count": self.count,
            "place": self.place,
            "issued": issued(),
            "collective": collective(self._main),
            "lock": lock_file(self._main),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.interval)):
            still = time.monotonic() - self.moved
            self._tell_waits()
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

    def _tell_waits(self) -> None:
        """Say what has been waited for since WAIT seconds: a lock file, a compiler, or before the first step other ranks."""
        file, made, now = lock_file(self._main), compiling(self._main), time.monotonic()
        what = file or made or (None if self.count else collective(self._main))
        begun = issued()  # one collective after another is no wait
        if what is None or (what, begun) != self._waits[:2]:
            self._waits = what, begun, now, now + WAIT
            return
        if now < self._waits[3]:
            return
        self._waits = what, begun, self._waits[2], now + AGAIN
        seconds = f"has waited {now - self._waits[2]:.0f} s for"
        me = f"rank {self.ranks.rank} (process {os.getpid()} on {socket.gethostname()})"
        if file is not None:
            known = "" if os.path.realpath(file) in open_files() else ", which no process of this host has open"
            print(
                f"{me} {seconds} the lock {file}{known}: delete it if nobody is at work there",
                file=sys.stderr,
                flush=True,
            )
        elif made is not None:
            print(f"{me} {seconds} the compiler in {made}: once, for a minute or two", file=sys.stderr, flush=True)
        elif others := missing(self._everyone() or {}, self.ranks.rank):
            advice = "see its output and its machine; lead-ds doctor looks for locks that were left"
            print(f"{me} {seconds} {'; '.join(others[:4])}: {advice}", file=sys.stderr, flush=True)

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
            begun = (self.folder / "config.yaml").exists()
            then = "continue with --resume" if begun else "start it again"
            tell(f"watchdog: no progress for {still:.0f} s: {where} (end what blocks it and {then})")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"watchdog-rank-{self.ranks.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:
            tell(f"watchdog: its file cannot be written, this is where rank {self.ranks.rank} stands: {error}")
            faulthandler.dump_traceback()
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
        self._in_time(lambda: answer.append(self._store.add("reported", 1)))
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


@contextmanager
def waiting_ranks() -> Iterator[Ranks]:
    """The processes of a command that has no steps, as `ranks`; what they wait for is said, and none is ended."""
    with ranks() as here:
        watch = Watchdog(here, 0, Path(), Signals(), place="its work")
        watch._key = "lead-ds/waits"  # they may train within, under a watchdog of its own
        with watch:
            yield here


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
    least = min((entry["count"], entry["issued"]) for entry in now.values())
    behind = [rank for rank in now if (now[rank]["count"], now[rank]["issued"]) == least]
    if frozen:
        blamed, how = frozen, "does not answer, last seen in"
    elif len(behind) < len(now):
        blamed, how = behind, "hangs in"
    else:
        apart = [rank for rank in now if now[rank]["collective"] is None]
        blamed, how = (apart, "hangs in") if 0 < len(apart) < len(now) else (list(now), "stands still in")
    others = [rank for rank in now if rank not in blamed]
    uneven = len({entry["issued"] for entry in now.values()}) > 1

    def where(rank: int, how: str) -> str:
        return _where(rank, now[rank], how) + (f", {now[rank]['issued']} collectives issued" if uneven else "")

    text = "; ".join(where(rank, how) for rank in blamed[:4])
    return text + (f"; {where(others[0], 'waits in')}" if others else "")


def missing(entries: dict[int, dict[str, Any] | None], own: int) -> list[str]:
    """Whom the ranks in a collective wait for, where rank `own` is the first of those; else nobody."""
    waiting = [rank for rank, entry in entries.items() if entry is not None and entry["collective"] is not None]
    if own != min(waiting, default=None):
        return []
    found: list[str] = []
    for rank, entry in entries.items():
        if entry is None:
            found.append(f"rank {rank}, which has not answered yet")
        elif entry["collective"] is None:
            lock = f", waiting for the lock {entry['lock']}" if entry["lock"] else ""
            found.append(_where(rank, entry, "in") + lock)
    return found


def _where(rank: int, entry: dict[str, Any], how: str) -> str:
    inside = f", {entry['collective']}" if entry["collective"] else ""
    return f"rank {rank} (process {entry['pid']} on {entry['host']}) {how} {entry['place']}{inside}"


def tell(line: str) -> None:
    """One line to stderr, past any buffering: the process is about to end."""
    os.write(2, f"error: {line}\n".encode())
