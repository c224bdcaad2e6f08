"""Processes that need not import everything anew, which takes longer than most of what tests do in them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Read when torch and DeepSpeed are imported, so that what is forked from must have them, too.
IMPORTED_WITH = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

_context = get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.imported"])


def forked(function: Callable[..., None], *arguments: Any) -> Any:
    """A started process that calls a function with arguments: forked from one that has imported what most need."""
    before = dict(os.environ)
    os.environ.update(IMPORTED_WITH)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def become(environment: dict[str, str], out: str, err: str) -> None:
    """Give this process an environment, and files to print to; both may be one."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for name, number in ((out, 1), (err, 2)):
        file = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)


def run_command(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """`lead-ds ARGUMENTS`; ends the process with the command's status."""
    become(environment, out, err)
    from lead_ds.cli.main import main

    sys.argv = ["lead-ds", *arguments]
    main(arguments)


def lead_ds(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lead-ds ARGUMENTS` as from a shell: its status and what it printed."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch(), err.touch()
        process = forked(run_command, words, {**os.environ, **IMPORTED_WITH, **environment}, str(out), str(err))
        process.join()
        return subprocess.CompletedProcess(["lead-ds", *words], process.exitcode, out.read_text(), err.read_text())
