"""One owner for a folder that is written step by step: two runs must not mix in it, on one host or on several.

The owner's record, a file in the folder, names host, process and when it began, and beats. A record whose process has gone is
taken over: at once on the same host, where that can be seen; elsewhere when it has not beaten for a while. No clock of one
host is compared with that of another, and nothing rests on locks that NFS may lack. Where there are locks they keep two
that take over the same record apart.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, SoftFileLock, Timeout

from lead_ds.errors import InputError, LeadError, RunError
from lead_ds.io.json_text import parse_json
from lead_ds.io.notes import say_once
from lead_ds.io.waiting import holder, told_while_waiting

T = TypeVar("T")
RECORD = ".owner.json"
BEAT = 5.0  # seconds between two beats
SILENT = 45.0  # seconds without one after which an owner on another host is taken for gone


class Together(Protocol):
    """Processes that own a folder together; process 0 holds it for them."""

    @property
    def rank(self) -> int: ...
    def from_main(self, value: T) -> T:
        """Process 0's value, on every process."""


@contextmanager
def owned(folder: str | Path, who: str, together: Together | None = None, record: str = RECORD) -> Iterator[None]:
    """Own `folder`, made where it is absent, for the time of a job; every process of `together` calls this.

    who: what the owner is called in the error that another one meets. Raises InputError where another process has the
    folder, RunError when it cannot be made.
    """
    owner: Owner | None = None
    failed: LeadError | None = None
    if together is None or together.rank == 0:
        try:
            owner = Owner.take(Path(folder), who, record)
        except LeadError as error:
            failed = error
    if together is not None:
        failed = together.from_main(failed)
    if failed is not None:  # on every process, or the others would wait for ever
        raise failed
    try:
        yield
    finally:
        if owner is not None:
            owner.release()


class Owner:
    """The record of this process in a folder, and the thread that beats for it."""

    def __init__(self, path: Path, facts: dict[str, Any], made: bool) -> None:
        self.path, self.facts, self._made = path, facts, made
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lead-ds-owner", daemon=True)

    @classmethod
    def take(cls, folder: Path, who: str, record: str = RECORD) -> Owner:
        """Become the owner of `folder`. Raises as `owned`; where another host may have it, waits for a sign of life."""
        path = folder / record
        made = not folder.exists()
        facts = {"who": who, "token": secrets.token_hex(8), "beat": 0, **_here()}
        facts["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
        if made is False and not folder.is_dir():
            raise InputError(folder, "is a file", "choose a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                found = _read(path)
                if found is not None and _alive(path, found):
                    raise InputError(
                        folder, _described(found), "wait for it to end, or end it; or choose another folder"
                    )
                with _apart(path):
                    if (_read(path) or {}).get("token") != (found or {}).get("token"):
                        continue  # another one was faster: look at that one
                    _write(path, facts)
                    break
        except OSError as error:
            if made:
                with suppress(OSError):  # it may hold something, or not be there
                    folder.rmdir()
            raise RunError(
                folder,
                f"cannot be {'made' if made else 'written'}: {error}",
                "check the path, its permissions and the free space",
            ) from None
        owner = cls(path, facts, made)
        owner._thread.start()
        return owner

    def release(self) -> None:
        """Take the record away, and the folder with it where nothing came of the job that made it."""
        self._done.set()
        self._thread.join()
        with suppress(OSError):
            if (_read(self.path) or {}).get("token") == self.facts["token"]:
                self.path.unlink()
            if self._made:
                self.path.parent.rmdir()  # fails where it holds anything

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(OSError):  # a full disk must not end the job: a missed beat is made up for by the next
                found = _read(self.path)
                if found is not None and found.get("token") != self.facts["token"]:
                    # This process was stopped for so long that another host took it for gone.
                    text = f"error: {self.path.parent}: {_described(found)}: this process is ended (start it again with --resume)"
                    print(text, file=sys.stderr, flush=True)
                    # As Ctrl-C, which also ends a wait; what a script started in the background ignores that.
                    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)
                    return
                self.facts["beat"] += 1
                _write(self.path, self.facts)


def _here() -> dict[str, Any]:
    """This process: its host, as far as process numbers mean the same; its number; and when it was started."""
    host = socket.gethostname()
    with suppress(OSError):  # a container has the host's boot, and may have its name, but numbers of its own
        host += " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return {"host": host, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot; "" where nobody knows. Raises ProcessLookupError for one that ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except OverflowError:  # no system has such a number
            raise ProcessLookupError(pid) from None
        return ""
    if fields[0] in "ZX":  # ended, and not yet collected by its parent
        raise ProcessLookupError(pid)
    return fields[19]


def _alive(path: Path, found: dict[str, Any]) -> bool:
    here = _here()
    if found.get("host") == here["host"]:
        try:
            return _started(int(found["pid"])) == found["started"]
        except (ProcessLookupError, KeyError, TypeError, ValueError):
            return False
        except PermissionError:
            return True
    say_once(f"{path.parent}: {_described(found)}; waiting up to {SILENT:.0f} s for a sign of life from there")
    waited = time.monotonic()
    while time.monotonic() - waited < SILENT:
        time.sleep(min(BEAT, SILENT) / 5)
        # Read, not looked at: opening a file is when NFS asks the server.
        now = _read(path)
        if now is None:
            return False
        if (now.get("token"), now.get("beat")) != (found.get("token"), found.get("beat")):
            return True
    return False


def _described(found: dict[str, Any]) -> str:
    host = str(found.get("host", "?")).split(" ")[0]
    process = f"process {found.get('pid', '?')} on {host} since {found.get('since', '?')}"
    return f"{found.get('who', 'another process')} is at work here, {process}"


def _read(path: Path) -> dict[str, Any] | None:
    """The record; None where there is none; {} of one that was cut."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, facts: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{facts['token']}")
    try:
        temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _apart(path: Path) -> Iterator[None]:
    """One process at a time, while it takes a record over."""
    guard = path.with_name(path.name + ".lock")
    try:
        with told_while_waiting(lambda: f"{holder(guard)}, which takes over {path.parent}: end it if it hangs"):
            lock: FileLock | SoftFileLock = FileLock(guard, timeout=SILENT)
            try:
                lock.acquire()
            except NotImplementedError:  # a file system without locks: a file that is there or not serves there
                lock = SoftFileLock(guard, timeout=SILENT)
                lock.acquire()
    except Timeout:
        raise RunError(
            guard, f"is held for {SILENT:.0f} s by another process", "see what hangs there, or delete it"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            guard.unlink()  # while it is held: who waits for it finds the record changed
        lock.release()
