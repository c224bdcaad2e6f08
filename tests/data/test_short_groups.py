"""Groups whose own negatives are too few are counted, and reported where they are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lead_ds.config import Config
from lead_ds.data.groups.open import open_groups
from lead_ds.data.groups.rows import RowGroups
from lead_ds.io import notes
from lead_ds.settings.data import DataConfig
from tests.data.test_batches import batches

NAMES = ["p0", "p1", "p2", "p3"]
OWN = {  # negatives of each query, of which query i has the positive p{i}, and how many of them a draw can use
    "whole": (["p1", "p2"], 2),
    "its own positive alone": (["p1", "p1"], 0),
    "one, twice": (["p0", "p0", "p2"], 1),
    "none": ([], 0),
}


def _ids(folder: Path, lists: list[list[str]]) -> Path:
    folder.mkdir()
    write = {
        "corpus.jsonl": [{"_id": name, "text": f"text of {name}"} for name in NAMES],
        "queries.jsonl": [{"_id": f"q{i}", "text": f"query {i}"} for i in range(len(lists))],
        "train.jsonl": [
            {"query_id": f"q{i}", "positives": [NAMES[i]], "negatives": names} for i, names in enumerate(lists)
        ],
    }
    for name, rows in write.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _rows(lists: list[list[str]]) -> list[dict[str, Any]]:
    return [{"query": f"query {i}", "positives": [NAMES[i]], "negatives": names} for i, names in enumerate(lists)]


def test_groups_with_too_few_negatives_are_counted(tmp_path: Path) -> None:
    lists = [names for names, _ in OWN.values()]
    folder = _ids(tmp_path / "ids", lists)
    for wanted in (1, 2):
        short = sum(usable < wanted for _, usable in OWN.values())
        assert open_groups(DataConfig(path=str(folder), negatives=wanted)).short == short
        assert RowGroups.of(_rows(lists), negatives=wanted).short == short
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(lists)))
    told = DataConfig(path=str(tmp_path), train="texts.jsonl", format="texts", negatives=2)
    assert open_groups(told).short == 3


def test_pairs_list_none_and_are_not_counted(tmp_path: Path) -> None:
    nothing: list[list[str]] = [[], [], []]
    assert open_groups(DataConfig(path=str(_ids(tmp_path / "ids", nothing)), negatives=2)).short == 0
    assert RowGroups.of(_rows(nothing), negatives=2).short == 0


def test_a_run_reports_them(
    config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "_said", set())
    settings = config(batch_size=1, accumulation=1)
    groups = RowGroups.of(_rows([names for names, _ in OWN.values()]), negatives=settings.data.negatives)
    batches(settings, groups=groups)
    assert "of 4 groups have fewer than 3 negatives of their own" in capsys.readouterr().err
