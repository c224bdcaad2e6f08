"""One attempt at a job: processes forked from this one, which has imported everything and computed nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil
import torch

from lead_ds.errors import LeadError
from tests.stress.phases import Phases


@dataclass(frozen=True)
class Job:
    """What one process does, and its environment."""

    act: Callable[[], object]
    environment: Mapping[str, str] = field(default_factory=dict)


def forked(job: Job, log: Path, phases: Phases | None) -> int:
    """Fork a process that does a job in a session of its own and prints to `log`; its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):  # this process only notes them, and its children would, too
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(job.environment)
        torch.set_num_threads(1)
        if phases is not None:
            phases.install()
        job.act()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except LeadError as error:
        status = error.status
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Attempt:
    """The processes of `jobs`, and how each ended."""

    last: ClassVar[Attempt | None] = None

    def __init__(self, jobs: Sequence[Job], spots: Mapping[str, str], log: Path) -> None:
        self.log, self.began = log, time.monotonic()
        self.phases = [Phases(spots) for _ in jobs]
        self.pids = [forked(job, log, phases) for job, phases in zip(jobs, self.phases, strict=True)]
        self.statuses: dict[int, int] = {}
        Attempt.last = self

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def wait(self, seconds: float, nap: float = 0.01) -> bool:
        """Wait for all, so long at most; whether all have ended."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(nap)
        return True

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, or for the end."""
        while not condition() and not self.poll():
            time.sleep(0.0005)

    @property
    def stages(self) -> list[int]:
        """Process numbers of the stages of pipelines among them."""
        return [phases.stage for phases in self.phases if phases.stage]

    def kill(self, ranks: Sequence[int], number: int = signal.SIGKILL) -> None:
        """Send a signal to some of them; to a pipeline's stage: rank -1."""
        for pid in [
            *(self.pids[r] for r in ranks if r >= 0 and r not in self.statuses),
            *(self.stages * (-1 in ranks)),
        ]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def alive(self) -> list[str]:
        """The command lines of all that lives in their sessions, which they and all that they started are in."""
        sessions, found = {*self.pids, *self.stages}, []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) in sessions and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{pid}: {' '.join(psutil.Process(pid).cmdline())}"[:200])
            except (ProcessLookupError, psutil.Error):
                continue
        return found

    def told(self) -> str:
        """The end of what they printed."""
        return self.log.read_text("utf-8", "replace")[-3000:] if self.log.exists() else ""
