"""Two real hosts: network namespaces on a bridge, each with an address, an sshd and a name of its own, under pdsh.

A ZeRO-3 teacher sharded over both gives the losses that it gives on one host. A host that is cut off ends the other.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.jobs import losses_of
from tests.engine.running import copy_run, steps_of
from tests.helpers.hosts import Hosts, two_hosts
from tests.helpers.launch import launch

LIMIT = 60.0  # seconds in which a host that lost the other must have ended


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path / "hosts", "pdsh") as made:
        yield made


def finished(process: subprocess.Popen, config: Path, seconds: float) -> int:
    """A run's status, with what it printed where it does not end in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(config.with_suffix(".log").read_text()[-4000:]) from None


def test_a_teacher_sharded_over_two_hosts(configure: Callable[..., Path], hosts: Hosts, tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "extra_teacher": {"placement": "zero3"},
        "student": {"path": "dropout"},
        "train": {"steps": 14, "batch_size": 2, "save_every": 2, "keep": 20},
    }
    one, two = configure("one-host", **run), configure("two-hosts", **run)
    process = hosts.distill(two)
    [reference] = launch("tests.engine.fault_jobs:run_each", 2, configs=[str(one)])[0]
    status = finished(process, two, 240)
    told = two.with_suffix(".log").read_text()
    assert status == 0, told[-4000:]
    shares = re.findall(r"([\d.]+) of ([\d.]+) MB of parameters on each rank", told)
    assert shares, told
    np.testing.assert_array_equal(losses_of(tmp_path / "two-hosts"), reference)

    # The other host is cut off in the middle of a run.
    cut = copy_run(two, "cut", step=4)
    process = hosts.distill(cut, "--resume")
    deadline = time.monotonic() + 600
    while steps_of(tmp_path / "cut") < 6:
        assert process.poll() is None, cut.with_suffix(".log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert all(hosts.processes(host, "lead_ds") for host in (0, 1)), "each host runs a rank"
    hosts.cut(1)
    lost = time.monotonic()
    assert finished(process, cut, LIMIT + 20) != 0
    for host in (0, 1):  # either lost the other
        while left := hosts.processes(host, str(cut)):
            assert time.monotonic() - lost < LIMIT, [p.cmdline() for p in left]
            time.sleep(0.2)
    assert "connection lost: it died or was cut off" in cut.with_suffix(".log").read_text()
    hosts.cut(1, up=True)
    # Continued on the one host that is left, and on both: the same.
    [resumed] = launch("tests.engine.fault_jobs:run_each", 2, configs=[], resume=[str(cut)])[0]
    assert resumed == reference
