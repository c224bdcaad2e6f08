"""The benchmark of sizes: every step runs on a thousand passages; what was measured is kept, what was killed is finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import scale, scale_steps
from tests.helpers.launch import ROOT

APART = {"pipeline"}  # its stages are processes of their own, which tests/pipeline runs


def test_every_step_finds_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_steps, "TIMED_STEPS", 1)
    monkeypatch.setattr(scale_steps, "STUDENT", {**scale_steps.STUDENT, "hidden_size": 48, "num_hidden_layers": 1})
    monkeypatch.setattr(scale_steps, "ASKED", 20)
    monkeypatch.setenv("LEAD_DS_CACHE", str(tmp_path / "cache"))
    scale_steps.generate(1000, tmp_path)
    found = {}
    for row, steps in scale.ROWS.items():
        for step in steps if row not in APART else ():
            found[step.name] = scale_steps.STEPS[step.name](1000, tmp_path)
            if step.files:
                assert scale.written(tmp_path, step.files), f"{step.name} writes no {step.files}"
    assert found["index"] == {"groups": 100}
    assert found["tokens"] == {"texts": 1100}
    assert found["mine"]["queries"] == 100
    assert found["mine"]["negatives"] == 3000
    assert found["search_sq8"]["recall"] > 0.9
    assert all(found[f"search_{kind}"]["recall"] > 0.3 for kind in scale_steps.INDEXES)
    rows = {
        ("index", name, 1000): {"processor": 1.0, "wall": 1.0, "own": 1.0, "kills": 0, **facts}
        for name, facts in found.items()
    }
    assert "recall" in scale.table(
        {key: {"row": key[0], "step": key[1], "size": key[2], **row} for key, row in rows.items()}
    )


def test_a_killed_step_is_finished_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(scale.ROWS, "encode", [scale.Step("encode", "encoded/vectors-*.npy", 8192)])
    given = [
        "--sizes",
        "20000",
        "--rows",
        "encode",
        "--folder",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "rows.json"),
    ]
    scale.main([*given, "--minutes", "0"])
    assert scale.results(tmp_path / "rows.json") == {}
    scale.main([*given, "--plot", str(tmp_path / "plot.png")])
    [row] = scale.results(tmp_path / "rows.json").values()
    assert row["kills"] == 1
    assert row["redone"] == 0
    assert row["processor"] > 0
    assert row["own"] > 0
    assert not any((tmp_path / "data").iterdir()), "a row's data are deleted after it"
    assert (tmp_path / "plot.png").exists()
    before = os.stat(tmp_path / "rows.json").st_mtime_ns
    scale.main(given)
    assert os.stat(tmp_path / "rows.json").st_mtime_ns == before
