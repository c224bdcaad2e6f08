"""A teacher of another package, found through its entry point, teaches: the one file that it takes is in examples/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_teach import write
from tests.helpers.launch import ROOT
from tests.helpers.rooms import settings

PACKAGE = ROOT / "examples" / "own_teacher"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package as pip would lay it out: its module, and its metadata with the entry point."""
    folder = tmp_path / "site"
    information = folder / "lead_ds_overlap_teacher-0.1.dist-info"
    information.mkdir(parents=True)
    shutil.copy(PACKAGE / "overlap_teacher.py", folder)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: lead-ds-overlap-teacher\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text("[lead_ds.teachers]\noverlap = overlap_teacher:OverlapTeacher\n")
    assert 'overlap = "overlap_teacher:OverlapTeacher"' in (PACKAGE / "pyproject.toml").read_text()
    return folder


def run(site: Path, path: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`lead-ds distill` of a process that has the package."""
    found = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "lead_ds", "distill", path, "--quiet", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": found},
    )


def test_it_teaches_two_steps_and_is_refused_what_it_cannot_give(installed: Path, rooms: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "save_every": 2}
    losses = {"layer": {"weight": 0.0}, "response": {"weight": 1.0}, "contrastive": {"weight": 0.0}}
    tree = settings(rooms, tmp_path / "run", "cross_encoder", train=train, losses=losses)
    path = write(tmp_path / "run.yaml", {**tree, "teacher": {"kind": "overlap"}})
    done = run(installed, path, "teacher.k1=0.9")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] > 0 for row in rows if "loss" in row] == [True, True]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]["placement"] == "overlap"
    for override, told in (
        ("losses.layer.weight=1", "has no layers"),
        ("teacher.k1=0", "teacher"),
        ("teacher.k=1", "k1"),
    ):
        done = run(installed, path, f"output={tmp_path / 'other'}", override)
        assert done.returncode == 2, (override, done.stderr)
        assert told in done.stderr, done.stderr
    assert not (tmp_path / "other").exists()
