"""A stage's command as a process: given where to write, followed until it ends, stopped when we are."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

POLL = 0.1  # seconds
PLAIN = "lead-ds"

Run = Callable[[Sequence[str], Path, int], int]
"""(command, log to append to, a file descriptor that it keeps open) -> exit status, negative for a signal's number."""


def find_launcher(chosen: str) -> list[str]:
    """The words that stand for `lead-ds` in a distributed stage."""
    if chosen == "none":
        return [PLAIN]
    if chosen != "auto":
        return shlex.split(chosen)
    import torch

    gpus = torch.cuda.device_count()
    return ["deepspeed", "--num_gpus", str(gpus), "--module", "lead_ds"] if gpus > 1 else [PLAIN]


def spawn(command: Sequence[str], log: Path, keep: int) -> int:
    """Run a command, showing on stderr what it appends to `log`; its exit status.

    It writes to the file itself, so that nothing it prints is lost, and it may finish, when this process is killed. It
    is in a
    session of its own: a signal reaches it once, from here. It keeps the descriptor `keep` open: a lock on it
    lasts as long as either of us.
    """
    with log.open("ab") as file, log.open("rb") as reader:
        reader.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            executable(command),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(keep,),
        )
        with forwarding(process):
            while process.poll() is None:
                show(reader.read())
                with_timeout(process)
            show(reader.read())
        return process.returncode


def with_timeout(process: subprocess.Popen[bytes]) -> None:
    """Wait a little for the end of a process."""
    try:
        process.wait(POLL)
    except subprocess.TimeoutExpired:
        return


def show(said: bytes) -> None:
    """Pass on what a command printed."""
    if said:
        sys.stderr.write(said.decode("utf-8", "replace"))
        sys.stderr.flush()


def executable(command: Sequence[str]) -> list[str]:
    """The command with its program found: lead-ds as this interpreter's module, others on PATH or beside the interpreter."""
    program, *rest = command
    if program == PLAIN:
        return [sys.executable, "-m", "lead_ds", *rest]
    beside = Path(sys.executable).parent / program
    return [shutil.which(program) or (str(beside) if beside.exists() else program), *rest]


@contextmanager
def forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Meanwhile, signals that ask us to stop go to the process and all that it started; it is it who ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        try:
            os.killpg(process.pid, signal.SIGTERM if number == signal.SIGHUP else number)
        except ProcessLookupError:
            return

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
