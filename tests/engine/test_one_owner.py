"""A run's folder belongs to the processes of one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lead_ds.io.owner import RECORD, owned
from tests.helpers.launch import launch

JOB = "tests.engine.jobs:distil_each"


def test_no_run_begins_or_goes_on_beside_another(configure: Callable[..., Path], tmp_path: Path) -> None:
    path = configure("run", train={"steps": 2})
    with owned(tmp_path / "run", "another run"):  # by this process, which is none of theirs
        for told in launch(JOB, 2, configs=[str(path)]):
            assert "run: another run is at work here, process" in told[0]
        assert [file.name for file in (tmp_path / "run").iterdir()] == [RECORD]
    [[losses]] = launch(JOB, 1, configs=[str(path)])
    assert len(losses) == 2
    assert not (tmp_path / "run" / RECORD).exists()
    with owned(tmp_path / "run", "another run"):
        for resume, expected in ((True, "another run is at work here"), (False, "already holds a run")):
            [[told]] = launch(JOB, 1, configs=[str(path)], resume=resume)
            assert expected in told
