"""Evaluation of a model on a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lead_ds.config import StudentConfig
from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.models.load import load_student
from lead_ds.retrieval.evaluate import Task, draw_queries, evaluate_model, evaluate_path, open_encoder
from lead_ds.retrieval.metrics import score_run
from tests.helpers.launch import launch


def by_hand(model: Path, data: Path, split: str, measures: list[str]) -> dict[str, float]:
    scorer, encoder = open_encoder(str(model), "cpu")
    dataset = Dataset.open(data)
    qrels = dataset.qrels(split)
    with torch.no_grad():
        passages = torch.cat([scorer.embed(encoder.passages([dataset.corpus.text(i)])) for i in range(60)])
        run = {}
        for query in qrels:
            text = dataset.queries.text(dataset.queries.row(query))
            scores = (scorer.embed(encoder.queries([text])) @ passages.T)[0]
            run[query] = {dataset.corpus.ids[i]: score for i, score in enumerate(scores.tolist())}
    return score_run(run, qrels, measures).mean


def test_a_path_and_a_configuration(model: Path, data: Path) -> None:
    measures = ["nDCG@10", "RR@10", "R@5", "AP@1000"]
    expected = by_hand(model, data, "test", measures)
    assert 0 < expected["nDCG@10"] < 1
    assert evaluate_path(model, data, "test", measures, batch_size=8, quiet=True) == pytest.approx(expected)
    config = StudentConfig(path=str(model))
    assert evaluate_path(config, data, "test", measures, quiet=True) == pytest.approx(expected)


def test_three_processes_give_what_one_gives(model: Path, data: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    one = evaluate_model(scorer, encoder, Task(Dataset.open(data), "test"), quiet=True)
    results = launch("tests.retrieval.jobs:evaluate", 3, model=str(model), data=str(data), batch_size=3)
    for result in results:
        assert result["mean"] == pytest.approx(one.mean)
        assert result["per_query"]["nDCG@10"] == pytest.approx(one.per_query["nDCG@10"])
    # 10 queries and 60 passages in three shares: at most 4 and 20, in batches of 3.
    assert [result["forwards"] for result in results] == [2 + 7] * 3


def test_the_model_stays_in_training_mode(model: Path, data: Path) -> None:
    scorer = load_student(StudentConfig(path=str(model)), torch.float32)
    _, encoder = open_encoder(str(model), "cpu")
    assert scorer.training
    first = evaluate_model(scorer, encoder, Task(Dataset.open(data), "test"), quiet=True)
    assert scorer.training
    assert first == evaluate_model(scorer, encoder, Task(Dataset.open(data), "test"), quiet=True)


def test_a_sample_of_queries() -> None:
    qrels = {f"q{i}": {"a": 1} for i in range(20)}
    drawn = draw_queries(qrels, 5, seed=1)
    assert len(drawn) == 5
    assert drawn == draw_queries(qrels, 5, seed=1)
    assert drawn != draw_queries(qrels, 5, seed=2)
    assert draw_queries(qrels, 0, seed=1) == draw_queries(qrels, 99, seed=1) == qrels


def test_what_is_missing_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"qrels.nope\.tsv"):
        evaluate_path(model, data, "nope")
    with pytest.raises(InputError, match="'nDGC@10' is unknown"):
        evaluate_path(model, data, "test", ["nDGC@10"])
    with pytest.raises(InputError, match="no such folder"):
        evaluate_path(model, tmp_path / "absent")
