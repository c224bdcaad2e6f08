"""launch/deepspeed_hostfile.sh with LAUNCHER=openmpi: a real mpirun over two hosts, ssh between them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.jobs import losses_of
from tests.helpers.hosts import Hosts, needs
from tests.helpers.launch import ROOT, launch

RUN: dict[str, Any] = {
    "extra_teacher": {"placement": "zero3"},
    "student": {"path": "dropout"},
    "train": {"steps": 4, "batch_size": 2},
}


def openmpi(hosts: Hosts, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`launch/deepspeed_hostfile.sh ARGUMENTS` from the first host, one rank on each."""
    needs("mpirun", "ompi_info")
    command, environment = hosts.launched(*arguments)
    environment |= {
        "LAUNCHER": "openmpi",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )


def test_a_run_over_two_hosts(hosts: Hosts, configure: Callable[..., Path], tmp_path: Path) -> None:
    one, two = configure("one-host", **RUN), configure("two-hosts", **RUN)
    done = openmpi(hosts, "distill", str(two))
    assert done.returncode == 0, done.stdout[-4000:]
    [reference] = launch("tests.engine.fault_jobs:run_each", 2, configs=[str(one)])[0]
    assert losses_of(tmp_path / "two-hosts") == reference
    assert not [p for host in (0, 1) for p in hosts.processes(host, str(two))]


def test_wrong_input_is_told_with_its_status(hosts: Hosts, tmp_path: Path) -> None:
    done = openmpi(hosts, "distill", str(tmp_path / "missing.yaml"), "student.name=a b $HOME")
    assert done.returncode == 2, done.stdout[-4000:]
    assert "no such configuration file" in done.stdout
