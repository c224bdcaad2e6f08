"""Some kills of some jobs in every run of the tests; `make stress` kills 500 times, and keeps a log."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT
from tests.stress.log import Log

FEW = ["distill", "encode", "full disk: encode"]


@pytest.mark.parametrize(
    ("kills", "names"), [(6, FEW), pytest.param(60, [], marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_killed_at_random_moments(kills: int, names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    log, seed = tmp_path / "log.jsonl", random.randrange(10**6)
    command = [sys.executable, "-m", "tests.stress", str(kills), "--seed", str(seed), "--log", str(log)]
    done = subprocess.run([*command, "--only", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}\n{log.read_text()}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found = Log(log).summary()
    assert found["kills"] == kills
    assert found["differing"] == found["lost"] == found["partial"] == found["orphans"] == found["left"] == 0
    assert found["runs"] == sum(run["equal"] for run in Log(log).runs)


def test_the_log_drops_kills_of_a_run_that_never_ended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kill = {"work": "x", "victims": "rank 0", "phase": "a step", "lost": [], "partial": [], "orphans": []}
    rows = [
        {"run": 0, **kill},
        {"run": 1, **kill},
        {"run": 0, "work": "x", "kills": 1, "equal": True, "left": [], "seconds": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = Log(path)
    assert len(log.kills) == len(log.runs) == 1
    assert len(path.read_text().splitlines()) == 2
    log.add(run=2, **kill | {"lost": ["a"]})
    assert Log(path).summary()["kills"] == 1
