"""The scripts in examples/ and the notebook run as they stand, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = {
    "distil_in_ten_lines.py": (["cross", "student", "OUT"], "vectors; the model is in"),
    "callbacks.py": (["cross", "student", "data", "OUT"], "on the test split: {'nDCG@10'"),
    "own_student.py": (["cross", "OUT"], "the glacier grinds rock"),
    "search_and_rerank.py": (["student", "cross"], "the best passage by each layer"),
}
LONGEST = 60  # lines


def arguments_of(script: str, rooms: Path, out: Path) -> list[str]:
    return [str(out / "run" if name == "OUT" else rooms / name) for name in SCRIPTS[script][0]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(script: str, rooms: Path, tmp_path: Path) -> None:
    assert len((EXAMPLES / script).read_text().splitlines()) <= LONGEST
    command = [sys.executable, str(EXAMPLES / script), *arguments_of(script, rooms, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert SCRIPTS[script][1] in done.stdout


def test_every_example_is_run() -> None:
    others = {"own_loss.py"}  # in tests/engine
    assert {path.name for path in EXAMPLES.glob("*.py")} - others == set(SCRIPTS)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def test_the_notebook(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "distil.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "is kept without outputs"
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"TEACHER, STUDENT, OUTPUT = {str(rooms / 'cross')!r}, {str(rooms / 'student')!r}, 'runs'"
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert sum(line.count("The ") for output in outputs for line in [output.get("text", "")]) == 3
    for name in ("response", "with-layers"):
        assert (tmp_path / "runs" / name / "student" / "modules.json").exists()
