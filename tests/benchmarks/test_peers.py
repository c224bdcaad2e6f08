"""What the comparisons with other libraries, and the runs of large teachers, make of what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import billions, peers, peers_theirs
from benchmarks.billions_table import tables


def run(name: str, library: str, seconds: float, losses: list[float]) -> dict[str, Any]:
    return {
        "loss": "kl",
        "name": name,
        "round": 0,
        "library": library,
        "queries_per_second": {"processor": 8 / seconds, "wall": 4 / seconds},
        "first": {"processor": 7.0, "wall": 9.0},
        "peak": 900.0,
        "before": 600.0,
        "losses": losses,
        "nDCG@10": 0.5,
    }


def test_the_table_holds_each_run_against_the_other_library() -> None:
    rows = [
        run("lead-ds", "lead-ds", 1.0, [2.0, 1.0]),
        run("sentence-transformers", "sentence-transformers", 2.0, [2.0, 0.8]),
    ]
    lines = peers.table(rows).splitlines()
    assert lines[-2] == "| lead-ds | 8.00 | 4.00 | 7.0 (9.0) | 900 | 300 | 2.5e-01 | 0.5000 |"
    assert lines[-1].startswith("| sentence-transformers | 4.00 |")
    assert "| 0.0e+00 |" in lines[-1]


def test_batches_as_columns(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    row = {"query": "q", "passages": ["p", "n", "m"], "label": [9.0, 5.0, 1.0]}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = peers_theirs.columns(str(path), "kl")
    assert found == {
        "query": ["q"],
        "positive": ["p"],
        "negative_1": ["n"],
        "negative_2": ["m"],
        "label": [row["label"]],
    }
    margins = peers_theirs.columns(str(path), "margin")["label"][0]
    assert [round(margin, 6) for margin in margins] == [0.2, 0.4]
    assert "label" not in peers_theirs.columns(str(path), "labels")


def test_losses_of_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert billions.losses_of(path) == {}
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "nDCG@10": 0.5}\n{"step": 2, "lo', encoding="utf-8")
    assert billions.losses_of(path) == {1: 2.0}


def test_tables_of_large_teachers() -> None:
    rank = {
        "load_seconds": 3.0,
        "load_peak": 700.0,
        "parameters_held": 500.0,
        "parameters_whole": 1000.0,
        "held_after": 520.0,
        "forward_peak": 640.0,
        "forward_seconds": [9.0, 2.0, 2.0],
        "gather_seconds": 2.0,
        "gathered": 800.0,
    }
    parts = {
        "teacher shard": 500.0,
        "teacher gathered layers": 100.0,
        "student gradients": 25.0,
        "communication buffers": 400.0,
    }
    plan = {"parts": parts, "gloo": 60.0, "host": 0.0}
    steps = [[1, 0.0, 0.0, 400.0, 2.0], [2, 2.0, 1.0, 401.0, 1.9], [3, 4.0, 2.0, 401.0, 1.8]]
    rows = [
        {"model": "m", "placement": "zero3", "part": "alone", "ranks": [rank, rank], "plan": plan},
        {
            "model": "m",
            "placement": "zero3",
            "part": "distill",
            "ranks": [{"peak": 630.0, "steps": steps}],
            "plan": plan,
        }
        | {"steps": 3, "killed_after": 2, "taken_twice": 1, "equal": True},
    ]
    told = tables(rows)
    assert "| m | zero3 | 2 | 3 | 500 (0.500) | 520 | 640 | 660 | 700 | 2.0 | 2.0 s, 400 MiB/s |" in told
    assert "| m | zero3 | 3 | 2: 1 taken twice, equal | 630 | 735 | 0.86 | 2.00, 2.00 | +0 |" in told
