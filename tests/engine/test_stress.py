"""Killed at random moments, again and again: see `stress.py`; `make stress` kills 500 times."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_random_moments(kills: int) -> None:
    seed = random.randrange(10**6)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.stress", str(kills), "--seed", str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert f"'kills': {kills}" in done.stdout
