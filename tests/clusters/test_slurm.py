"""launch/slurm.sbatch as it is, on a real SLURM: a run over two hosts, lost hosts, wrong input, and an end that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.conftest import Slurm
from tests.engine.jobs import losses_of
from tests.engine.running import steps_of
from tests.helpers.launch import launch

RUN: dict[str, Any] = {
    "extra_teacher": {"placement": "zero3"},
    "student": {"path": "dropout"},
    "train": {"steps": 14, "batch_size": 2, "save_every": 2, "keep": 20},
}


@pytest.fixture
def reference(configure: Callable[..., Path]) -> list[float]:
    """The losses of the run on one host that nothing happens to."""
    return launch("tests.engine.fault_jobs:run_each", 2, configs=[str(configure("one-host", **RUN))])[0][0]


def until(slurm: Slurm, number: int, config: Path, step: int) -> None:
    """Wait until a job's run has made so many steps."""
    deadline = time.monotonic() + 1800
    while steps_of(config.with_suffix("")) < step:
        assert slurm.job(number)["JobState"] in ("PENDING", "RUNNING"), config.with_suffix(".log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_loses_each_of_its_hosts(
    slurm: Slurm, configure: Callable[..., Path], reference: list[float], tmp_path: Path
) -> None:
    config = configure("lost", **RUN)
    number = slurm.submit(config)
    until(slurm, number, config, 3)
    # All of the cores that the job asked for, not one for each task.
    assert "CPUs=128" in slurm.ask("scontrol", "show", "step", f"{number}.0")
    for host, step in ((1, 4), (0, 8)):  # the second runs a rank; the first the script, too
        until(slurm, number, config, step)
        slurm.kill_host(host)
        job = slurm.wait(number, "PENDING")
        slurm.start_host(host)
        # It holds the job back for two minutes. Sooner, we think, its order to end the job on the lost host, which it repeats
        # until the host is back, would meet the job that began again.
        slurm.wait(number, "RUNNING")
    job = slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
    told = config.with_suffix(".log").read_text()
    assert job["JobState"] == "COMPLETED", told[-4000:]
    assert job["Restarts"] == "2"
    assert losses_of(tmp_path / "lost") == reference
    assert not [p for host in (0, 1) for p in slurm.hosts.processes(host, str(config))]


def test_wrong_input_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.wait(slurm.submit(tmp_path / "missing.yaml"), "COMPLETED", "FAILED")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "no such configuration file" in (tmp_path / "missing.log").read_text()


def test_asked_to_end_it_saves_and_goes_on_when_asked(
    slurm: Slurm, configure: Callable[..., Path], reference: list[float], tmp_path: Path
) -> None:
    config = configure("asked", **RUN | {"train": {**RUN["train"], "save_every": 100}})
    number = slurm.submit(config)
    until(slurm, number, config, 4)
    slurm.ask("scancel", "--signal=TERM", str(number))  # as two minutes before the job's time is over
    job = slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED")
    told = config.with_suffix(".log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), told[-4000:]
    assert list((tmp_path / "asked").glob("checkpoints/step-*")), told[-4000:]
    job = slurm.wait(slurm.submit(config, "--resume"), "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED", config.with_suffix(".log").read_text()[-4000:]
    assert losses_of(tmp_path / "asked") == reference
