"""Lengths that differ from batch to batch cost few builds: each takes seconds, and every rank waits for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST = 8


def test_a_run_builds_each_operator_at_most_eight_times() -> None:
    """Nineteen lengths, two batch sizes, forward and backward: Triton's own keys, counted without a GPU."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.builds"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == {"attention_kl", "head_mean", "maxsim", "interaction", "layer_kl", "layer_kl of z-scores"}
    for name, kernels in found.items():
        assert 1 < sum(kernels.values()) <= MOST, (name, kernels)
