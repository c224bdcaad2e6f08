"""Whom the watchdog blames, where nothing but the number of issued collectives tells ranks apart."""

from __future__ import annotations

from pathlib import Path

import pytest

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
