"""The whole recipe, by its real commands, on tiny data: at one go, and killed in the middle of distilling and run again."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lead_ds.errors import RunError
from lead_ds.pipeline.run import run_pipeline
from tests.helpers.launch import ROOT
from tests.pipeline.commands import Forked
from tests.pipeline.test_run import TINY

# One model on one split: each further stage is one more process.
FEWER = ["pipeline.models=[distilled]", "pipeline.evaluate=[{split: test}]", "pipeline.lens={steps: 20}"]
STAGES = ["negatives", "first", "mine", "teacher", "student", "lens", "teach", "distill", "report"]
STAGES += ["encode", "index", "search-test", "evaluate-test"]


def overrides(rooms: Path, output: Path) -> list[str]:
    paths = {"teacher.path": rooms / "cross", "student.path": rooms / "student", "data.path": rooms / "data"}
    return [*(f"{key}={path}" for key, path in paths.items()), f"output={output}", *FEWER]


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def distilling(command: Sequence[str]) -> bool:
    """Whether the distillation that `command` is has left its first checkpoint."""
    output = next((word for word in reversed(command) if word.startswith("output=")), "")
    return command[1] == "distill" and (Path(output.removeprefix("output=")) / "checkpoints/step-00000002").exists()


@pytest.mark.usefixtures("_one_thread")
def test_a_pipeline_that_was_killed_ends_as_one_that_was_not(rooms: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    pytest.importorskip("faiss")
    whole = Forked()
    told: list[str] = []
    expected = run_pipeline(TINY, overrides(rooms, tmp_path / "whole"), run=whole, tell=told.append)
    assert whole.ran[1:] == STAGES

    # The stages before, moved to another folder, are still complete; the distillation is killed in the middle.
    stages = tmp_path / "killed" / "stages"
    for name in STAGES[:7]:
        [folder] = (tmp_path / "whole" / "stages").glob(f"{name}-*")
        shutil.copytree(folder, stages / folder.name)
    killed = Forked(harm=distilling)
    again = overrides(rooms, tmp_path / "killed")
    with pytest.raises(RunError, match=r"stage distill: was killed by signal 9 \(log: .*log\.txt; .* continues\)"):
        run_pipeline(TINY, again, run=killed, tell=told.append)
    assert killed.ran[1:] == STAGES[7:8]
    [distill] = stages.glob("distill-*")
    assert not (distill / "run" / "student").exists()

    told.clear()
    continued = Forked()
    tree = run_pipeline(TINY, again, run=continued, tell=told.append)
    assert continued.ran[1:] == STAGES[7:]
    states = {line.split()[0]: line.split("  ")[1:] for line in told[0].splitlines()[1:]}
    assert "--resume" in next(line for line in told[0].splitlines() if line.startswith("distill"))
    assert all("done" in "".join(states[name]) for name in STAGES[:7])

    # The same student, bit for bit, and so the same numbers.
    weights = [Path(one["student"]) / "model.safetensors" for one in (expected, tree)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert tree["results"] == expected["results"]
    assert [(row["model"], row["split"], row["queries"]) for row in tree["results"]] == [("distilled", "test", 10)]
    rows = [json.loads(line) for line in (distill / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in rows)

    # Killed when a command had ended and its record was not yet written: every command, given again, ends the same way.
    for record in stages.glob("*/stage.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
    again_all = Forked()
    repeated = run_pipeline(TINY, again, run=again_all, tell=told.append)
    assert again_all.ran[1:] == STAGES
    assert repeated["results"] == expected["results"]


def test_the_command(rooms: Path, tmp_path: Path) -> None:
    arguments = [str(TINY), *overrides(rooms, tmp_path / "out")]
    plan = lead_ds(*arguments, "--dry-run", "--json", "--launcher", "deepspeed --num_gpus 2 --module lead_ds")
    assert plan.returncode == 0, plan.stderr
    commands = {one["stage"]: one["commands"][0] for one in json.loads(plan.stdout)["stages"]}
    assert list(commands) == STAGES
    for name, command in commands.items():
        distributed = name in ("first", "teacher", "student", "lens", "teach", "distill", "encode")
        assert command.startswith("deepspeed --num_gpus 2 --module lead_ds " if distributed else "lead-ds ")
        assert command in plan.stderr
    wrong = lead_ds(*arguments, "train.step=3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith(f"error: {TINY}: train.step: unknown key (did you mean 'steps'?")
    assert len(wrong.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_by_the_command_under_a_launcher(rooms: Path, tmp_path: Path) -> None:
    """From a shell, training by two processes; then a plan that knows of it."""
    arguments = [str(TINY), *overrides(rooms, tmp_path / "out"), "pipeline.first=null", "pipeline.mine=null"]
    arguments += ["pipeline.negatives.source=random", "pipeline.teacher=null"]
    launcher = "deepspeed --num_accelerators 2 --module lead_ds"
    done = lead_ds(*arguments, "--stages", "student", "--json", "--launcher", launcher)
    assert done.returncode == 0, done.stderr
    states = {one["stage"]: one["state"] for one in json.loads(done.stdout)["stages"]}
    assert states["student"] == "done"
    assert f"+ {launcher} warmup" in done.stderr
    assert "step 4/4" in done.stderr
    assert "2 process(es)" in done.stderr
    assert "student        done" in lead_ds(*arguments, "--dry-run").stdout


def lead_ds(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lead_ds", "pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
