"""A rank ends when one of those that started it has been killed; what is started by hand outlives its shell."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from lead_ds.engine.distributed import launchers
launchers.EVERY = 0.05
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with launchers.ends_with_launchers():
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"


def chain(folder: Path, *names: str) -> tuple[subprocess.Popen, psutil.Process]:
    """Processes, each started by the one before, that run programs of these names; the last starts a rank. First and rank."""
    words: list[str] = []
    for name in names:
        program = folder / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(PARENT)
        words += [str(program)]
    (folder / "rank").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    first = subprocess.Popen(
        [sys.executable, *words, str(folder / "rank"), str(folder / "pid")],
        env=environment,
        stderr=(folder / "log").open("w"),
    )
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert first.poll() is None
        time.sleep(0.02)
    return first, psutil.Process(int((folder / "pid").read_text()))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_ends_with_its_launchers(killed: int, tmp_path: Path) -> None:
    first, rank = chain(tmp_path, "launch/local.sh", "launch/rank.py")
    middle = rank.parent()
    assert middle is not None
    try:
        (first if killed == 0 else middle).kill()
        psutil.wait_procs([rank], timeout=600)
        assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
        assert "which started this rank, has gone: it stops" in (tmp_path / "log").read_text()
    finally:
        for process in (rank, middle):
            if process.is_running():
                process.kill()
        first.kill()
        first.wait()


def test_what_is_started_by_hand_goes_on(tmp_path: Path) -> None:
    first, rank = chain(tmp_path, "mine/script.py")
    try:
        first.kill()
        first.wait()
        time.sleep(0.5)
        assert rank.is_running()
        assert rank.status() != psutil.STATUS_ZOMBIE
        assert (tmp_path / "log").read_text() == ""
    finally:
        rank.kill()
