"""The report of a run's folder."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lead_ds.errors import InputError
from lead_ds.report import summarize, write_report
from lead_ds.report.record import COLUMNS, read_run_record

PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, layers: list[int] | None = None, **parts: float) -> dict[str, Any]:
    result: dict[str, Any] = {
        "step": step,
        "loss": 4.0 / step,
        "parts": parts or {"contrastive": 2.0 / step},
        "lr": 1e-5,
    }
    if layers is not None:
        k = len(layers)
        names = ("kl", "nll", "teacher_entropy", "student_entropy")
        result["layers"] = {
            "teacher": layers,
            "student": list(range(k)),
            "weights": [1 / k] * k,
            **{name: [0.1 * layer for layer in layers] for name in names},
        }
    return result


def write_run(folder: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows) + end)
    return folder


def evaluation(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "evaluation": {name.replace("_", "@"): value for name, value in values.items()}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    draw = random.Random(0)
    rows = [row(step, sorted(draw.sample(range(12), 3)), contrastive=3 / step, layer=1.0) for step in range(1, 61)]
    rows += [evaluation(20, nDCG_10=0.2, R_100=0.5), evaluation(40, nDCG_10=0.4, R_100=0.6)]
    rows += [evaluation(60, nDCG_10=0.3, R_100=0.7)]
    folder = write_run(tmp_path / "<b>run & co</b>", rows)
    (folder / "config.yaml").write_text("output: '<script>alert(1)</script>'\n")
    facts = {"command": ["lead-ds", "distill", "<img src=x>"], "versions": {"torch": "2.13"}, "kernels": "torch"}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_page_holds_everything_and_escapes_it(run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    assert page == run / "report" / "index.html"
    text = page.read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 3
    for name, image in zip(("losses.png", "layers.png", "metrics.png"), images, strict=True):
        assert base64.b64decode(image) == (run / "report" / name).read_bytes()
        assert base64.b64decode(image).startswith(PNG)
    assert "<script" not in text
    assert "<img src=x>" not in text
    assert "<b>run" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "http" not in text
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "index.html",
        "layers.png",
        "losses.png",
        "metrics.png",
        "summary.txt",
    ]
    elsewhere = write_report(run, tmp_path / "out")
    assert elsewhere == tmp_path / "out" / "index.html"


def test_summary(run: Path) -> None:
    text = summarize(read_run_record(run))
    assert re.search(r"nDCG@10 +0\.2000 +0\.4000 +40 +0\.3000", text)
    assert re.search(r"^steps: 60$", text, re.M)
    contrastive = sum(3 / step for step in range(1, 7)) / 6, sum(3 / step for step in range(55, 61)) / 6
    assert re.search(rf"contrastive +{contrastive[0]:.4f} +{contrastive[1]:.4f}", text)


def test_layer_map_by_hand(tmp_path: Path) -> None:
    rows = [row(1, [0, 2]), row(2, [1, 2]), row(3)]
    rows[0]["layers"]["weights"], rows[1]["layers"]["weights"] = [0.25, 0.75], [0.4, 0.6]
    values, edges = read_run_record(write_run(tmp_path, rows)).layer_map("weights")  # type: ignore[misc]
    nan = np.nan
    np.testing.assert_array_equal(values, [[0.25, nan], [nan, 0.4], [0.75, 0.6]])
    assert edges.tolist() == [0, 1, 2]


def test_long_runs_are_averaged_over_stretches(tmp_path: Path) -> None:
    rows = [row(step, [step % 2]) for step in range(1, 4 * COLUMNS + 1)]
    values, edges = read_run_record(write_run(tmp_path, rows)).layer_map("nll")  # type: ignore[misc]
    assert values.shape == (2, COLUMNS)
    assert edges[[0, -1]].tolist() == [0, 4 * COLUMNS]
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values, [[0.0] * COLUMNS, [0.1] * COLUMNS])


def test_a_run_without_layers_or_evaluations(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", [row(1)]))
    assert page.read_text().count("<img") == 1


def test_a_run_with_an_evaluation_only(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", [evaluation(0, nDCG_10=0.1)]))
    assert page.read_text().count("<img") == 1


@pytest.mark.parametrize("end", ['{"step": 2, "lo', "\x00\x00", '{"step": 2}\n', "[]\n"])
def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path, end: str) -> None:
    record = read_run_record(write_run(tmp_path, [row(1)], end))
    assert [item["step"] for item in record.steps] == [1]
    assert write_report(tmp_path).exists()


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl: no such file"):
        write_report(tmp_path / "absent")
    with pytest.raises(InputError, match="no metrics yet"):
        write_report(write_run(tmp_path / "empty", []))
    with pytest.raises(InputError, match=r"metrics\.jsonl:1: not a row"):
        write_report(write_run(tmp_path / "wrong", [{"hello": 1}, row(1)]))
    assert not (tmp_path / "wrong" / "report").exists()
    for wrong in (
        {"step": 1, "loss": 1.0, "parts": {"response": "x"}},
        {"step": 1, "evaluation": {"nDCG@10": None}},
        {"step": 1, "loss": 1.0, "layers": {"weights": [1, 2]}},
        {"step": 1, "loss": 1.0, "layers": {"teacher": [1], "weights": [1, 2]}},
    ):
        with pytest.raises(InputError, match=r"metrics\.jsonl:1: not a row"):
            write_report(write_run(tmp_path / "wrong", [wrong, row(2)]))
