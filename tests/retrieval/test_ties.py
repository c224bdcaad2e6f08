"""A model that gives every passage the same score orders nothing, and the user is warned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.errors import InputError
from lead_ds.io import notes
from lead_ds.retrieval.evaluate import Task, evaluate_path, evaluate_run
from lead_ds.retrieval.mine import MineSettings, mine
from lead_ds.retrieval.rerank import evaluate_ordered
from lead_ds.retrieval.ties import telling_ties
from tests.helpers.tiny import tiny_dataset, write_jsonl

TOLD = "one score for all its passages"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_said", set(), raising=False)


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([{"q": {"a": 1.0, "b": 1.0}}, {"r": {"a": 2.0, "c": 2.0}}], True),
        ([{"q": {"a": 1.0, "b": 1.0}, "r": {"a": 2.0, "c": 3.0}}], False),
        ([{"q": {"a": 1.0, "b": 1.0}, "r": {"a": 2.0}}], False),  # one query alone says little
        ([], False),
    ],
)
def test_when_it_is_told(runs: list[Run], told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(telling_ties(runs)) == runs
    assert (TOLD in capsys.readouterr().err) is told


def test_wherever_passages_are_ordered(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_dataset(tmp_path / "data", passages=60, queries=20)
    write_jsonl(data / "corpus.jsonl", [{"_id": f"p{i}", "text": "the same words"} for i in range(60)])
    evaluate_path(model, data, "test", ["nDCG@10"], quiet=True)
    assert TOLD in capsys.readouterr().err
    dataset = Dataset.open(data)
    listed = {query: {"p1": 1.0, "p2": 2.0} for query in dataset.qrels("test")}
    notes._said.clear()
    evaluate_ordered(
        lambda wanted: {q: dict.fromkeys(found, 0.5) for q, found in wanted.items()}, Task(dataset, "test"), listed
    )
    assert TOLD in capsys.readouterr().err
    notes._said.clear()
    found = {query: {"p1": 1.0, "p2": 1.0} for query in dataset.qrels("train")}
    mine(found, dataset, tmp_path / "mined.jsonl", settings=MineSettings(number=1), quiet=True)
    assert TOLD in capsys.readouterr().err


def test_judgements_that_nothing_reaches(data: Path) -> None:
    told = re.escape("test: no judgement is 3 or more, the highest is 1: every measure would be 0")
    with pytest.raises(InputError, match=told):
        Task(Dataset.open(data), "test", relevance_level=3).qrels()
    with pytest.raises(InputError, match=r"no judgement is 1 or more, the highest is 0"):
        evaluate_run({"q": {"p": 1.0}}, {"q": {"p": 0}})
