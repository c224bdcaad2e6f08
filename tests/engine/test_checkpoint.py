"""Checkpoints are whole or absent; a damaged one is told and passed over; old ones go, the best stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.checkpoint import MANIFEST, Checkpoints, damage
from lead_ds.errors import RunError

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


class Files:
    """Writes as DeepSpeed's checkpoint engine does."""

    def save(self, state: Any, path: str) -> None:
        torch.save(state, path)


class FileEngine:
    """What `Checkpoints` needs of an engine, with one real tensor file; DeepSpeed's own is used in test_resume."""

    def __init__(self, value: float = 0.0, size: int = 1000) -> None:
        self.module = torch.nn.Linear(size, 1)
        self.checkpoint_engine = Files()
        self.value = value

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save(torch.full((1000,), self.value), str(Path(folder) / tag / "model.pt"))


def save(folder: Path, steps: list[int], keep: int = 3, best: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, ALONE, keep)
    for step in steps:
        mark = {"step": step, "value": 1.0, "checkpoint": f"step-{step:08d}"} if step == best else None
        checkpoints.save(FileEngine(step), step, {"step": step}, best=mark)
    return checkpoints


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, [1, 2, 3, 4, 5], keep=2, best=1)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000004", "step-00000005"]
    best = checkpoints.best()
    assert best is not None
    assert best["step"] == 1


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "no manifest"])
def test_falls_back_past_a_damaged_checkpoint_and_says_so(tmp_path: Path, harm: str) -> None:
    checkpoints = save(tmp_path, [1, 2])
    file = tmp_path / "step-00000002" / "model.pt"
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))
    elif harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        file.unlink()
    else:
        (tmp_path / "step-00000002" / MANIFEST).unlink()
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found[1] == {"step": 1}
    assert len(told) == 1
    assert "step-00000002" in told[0]


def test_what_a_kill_left_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, [1])
    left = tmp_path / "step-00000002.partial"
    left.mkdir()
    (left / "model.pt").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, ALONE, 3)
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found[1]["step"] == 1
    checkpoints.save(FileEngine(), 2, {"step": 2})
    assert not left.exists()
    assert damage(tmp_path / "step-00000002") is None


def test_a_checkpoint_that_would_not_fit_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = save(tmp_path, [1])
    usage: Any = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RunError, match="no space left") as caught:
        checkpoints.save(FileEngine(), 2, {"step": 2})
    assert "earlier checkpoints are intact" in str(caught.value)
    assert damage(tmp_path / "step-00000001") is None
    assert not (tmp_path / "step-00000002").exists()


def test_a_write_that_fails_half_way_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    """The file size limit of a process stands in for a full disk: the write itself fails, as there."""
    code = f"""
import resource, signal
from pathlib import Path
from tests.engine.test_checkpoint import *
checkpoints = save(Path({str(tmp_path)!r}), [1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    checkpoints.save(FileEngine(), 2, {{"step": 2}})
except RunError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "checkpoint of step 2 could not be saved" in done.stdout, done.stderr
    assert damage(tmp_path / "step-00000001") is None
    assert [p.name for p in tmp_path.glob("step-*") if not p.name.endswith(".partial")] == ["step-00000001"]


def test_state_is_plain_json(tmp_path: Path) -> None:
    save(tmp_path, [1])
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text()) == {"step": 1}


class Killed(BaseException):
    pass


def half(path: Path) -> None:
    """A removal that is killed."""
    (path / "model.pt").unlink()
    raise Killed


def test_a_kill_while_a_step_is_saved_again_leaves_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = save(tmp_path, [10], keep=1)
    monkeypatch.setattr("lead_ds.engine.records.checkpoint.shutil.rmtree", half)
    with pytest.raises(Killed):
        checkpoints.save(FileEngine(), 10, {"step": 10, "owed": False})
    monkeypatch.undo()
    found = Checkpoints(tmp_path, ALONE, 1).newest(pytest.fail)
    assert found is not None
    assert found[1] == {"step": 10, "owed": False}


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = save(tmp_path, [1], keep=1)
    monkeypatch.setattr("lead_ds.engine.records.checkpoint.shutil.rmtree", half)
    with pytest.raises(Killed):
        checkpoints.save(FileEngine(), 2, {"step": 2})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.old.partial", "step-00000002"]
    Checkpoints(tmp_path, ALONE, 1).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    checkpoints.save(FileEngine(), 3, {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"]
