"""Whom the watchdog blames, where nothing but the number of issued collectives tells ranks apart, and what else it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine.watchdog_jobs import alone
from tests.helpers.forked import forked
from tests.helpers.launch import launch


@pytest.mark.parametrize("blamed", [0, 1])
def test_the_rank_that_has_not_issued_the_collective_is_named(tmp_path: Path, blamed: int) -> None:
    found = launch("tests.engine.watchdog_jobs:late", 2, folder=str(tmp_path), blamed=blamed)[0]
    one, other = found.split("; ")
    assert one.startswith(f"rank {blamed} (process ")
    assert "hangs in step 3, student forward" in one
    assert other.startswith(f"rank {1 - blamed} (process ")
    assert "waits in step 3, student forward" in other
    issued = [int(part.split(", ")[-1].split()[0]) for part in (one, other)]
    assert issued[1] == issued[0] + 1


def test_a_command_without_steps_says_whom_it_waits_for() -> None:
    told = launch("tests.engine.watchdog_jobs:waiting", 2)[0]
    assert re.search(
        r"rank 0 \(process \d+ on .*\) has waited \d+ s for rank 1 \(process \d+ on .*\) in its work: see", told
    )


def test_where_ranks_stand_is_told_where_no_file_can_be_written(tmp_path: Path) -> None:
    told = tmp_path / "told"
    process = forked(alone, str(told))
    process.join()
    assert process.exitcode == 1
    said = told.read_text()
    assert "loading data and models (end what blocks it and start it again)" in said
    assert "watchdog: its file cannot be written, this is where rank 0 stands" in said
    assert "Current thread" in said or "Thread 0x" in said
