"""Queries that are passages themselves, as in ArguAna, Quora and CQADupStack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lead_ds.cli.main import main
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.groups.open import open_groups
from lead_ds.retrieval.evaluate import Task, evaluate_model, evaluate_run, open_encoder
from lead_ds.retrieval.identical import without_identical
from lead_ds.retrieval.mine import MineSettings, mine
from lead_ds.retrieval.rerank import find_candidates
from lead_ds.retrieval.search import Searcher
from lead_ds.settings.data import DataConfig
from tests.helpers.tiny import write_jsonl

FACTS = ["the octopus has three hearts", "glaciers grind rock into flour", "a violin has four strings", "bread rises"]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Queries a0.. are the passages a0.., word for word; relevant to a query is the next passage, never itself."""
    folder = tmp_path / "drawn"
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"a{i}", "title": "t", "text": text} for i, text in enumerate(FACTS)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"a{i}", "text": text} for i, text in enumerate(FACTS)])
    (folder / "qrels").mkdir()
    lines = "".join(f"a{i}\ta{(i + 1) % len(FACTS)}\t1\n" for i in range(len(FACTS)))
    for split in ("test", "train"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def test_a_run_is_scored_as_beir_scores_it(capsys: pytest.CaptureFixture[str]) -> None:
    run, qrels = {"a1": {"a1": 9.0, "a2": 8.0}}, {"a1": {"a2": 1}}
    assert evaluate_run(run, qrels, ["nDCG@10"]).mean == {"nDCG@10": 1.0}
    told = capsys.readouterr().err
    assert "1 query found itself" in told
    assert "--keep-identical" in told
    assert evaluate_run(run, qrels, ["nDCG@10"], keep_identical=True).mean["nDCG@10"] == pytest.approx(0.6309, abs=1e-4)


def test_equal_ids_by_chance_cost_no_relevant_passage() -> None:
    assert evaluate_run({"7": {"7": 9.0, "8": 8.0}}, {"7": {"7": 1}}, ["RR@10"]).mean == {"RR@10": 1.0}
    assert without_identical({"7": {"7": 9.0, "8": 8.0}}, 1, {"7": {"7": 0}}) == {"7": {"8": 8.0}}


def test_a_model_is_evaluated_without_them_and_to_the_full_depth(drawn: Path, model: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    dataset = Dataset.open(drawn)
    out = drawn / "out.trec"
    evaluate_model(scorer, encoder, Task(dataset, "test", ["R@3"]), quiet=True, out=out)
    lines = [line.split() for line in out.read_text().splitlines()]
    assert len(lines) == 4 * 3  # three others of every query
    assert all(query != passage for query, _, passage, *_ in lines)
    assert evaluate_model(scorer, encoder, Task(dataset, "test", ["R@3"]), quiet=True).mean == {"R@3": 1.0}


def test_search_of_a_dataset_leaves_them_out_and_a_question_does_not(drawn: Path, model: Path, tmp_path: Path) -> None:
    options = ["search", "--model", str(model), "--data", str(drawn), "-k", "2", "--out", str(tmp_path / "run.trec")]
    for extra, kept in (([], False), (["--split", "test"], False), (["--keep-identical"], True)):
        with pytest.raises(SystemExit) as ended:
            main([*options, *extra])
        assert not ended.value.code
        lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
        assert len(lines) == 8
        assert any(query == passage for query, _, passage, *_ in lines) == kept
    searcher = Searcher.open(model, drawn, quiet=True)
    assert set(searcher.run(["a0"], [FACTS[0]], 4)["a0"]) == {"a0", "a1", "a2", "a3"}


@pytest.mark.parametrize("source", ["bm25", "model", "run"])
def test_a_query_is_no_negative_of_itself(drawn: Path, model: Path, tmp_path: Path, source: str) -> None:
    dataset = Dataset.open(drawn)
    run = {f"a{i}": {f"a{j}": 4.0 - (j != i) for j in range(4)} for i in range(4)}
    found = {"bm25": "bm25", "model": model, "run": run}[source]
    out = tmp_path / "train.jsonl"
    mined = mine(found, dataset, out, settings=MineSettings(number=2), quiet=True)
    assert mined.left_out["itself"] == 4
    for line in out.read_text().splitlines():
        group = json.loads(line)
        assert group["query_id"] not in group["negatives"]
    mine(run, dataset, out, settings=MineSettings(number=3, keep_identical=True), quiet=True)
    assert all(json.loads(line)["query_id"] in json.loads(line)["negatives"] for line in out.read_text().splitlines())


def test_equal_texts_of_other_ids_are_no_negatives_either(drawn: Path, tmp_path: Path) -> None:
    write_jsonl(drawn / "queries.jsonl", [{"_id": f"q{i}", "text": f" {text}\n"} for i, text in enumerate(FACTS)])
    for name in ("test", "train"):
        path = drawn / "qrels" / f"{name}.tsv"
        path.write_text("".join(f"q{i}\ta{(i + 1) % 4}\t1\n" for i in range(4)))
    run = {f"q{i}": {f"a{j}": 4.0 - (j != i) for j in range(4)} for i in range(4)}
    out = tmp_path / "train.jsonl"
    assert mine(run, Dataset.open(drawn), out, settings=MineSettings(number=2), quiet=True).left_out["itself"] == 4


def test_candidates_of_a_reranker_are_as_many_without_it(drawn: Path) -> None:
    dataset = Dataset.open(drawn)
    write = drawn / "run.trec"
    write.write_text("".join(f"a0 Q0 a{j} {j + 1} {9 - j} x\n" for j in range(4)))
    assert list(find_candidates(dataset, dataset.qrels("test"), 2, write)["a0"]) == ["a1", "a2"]
    assert list(find_candidates(dataset, ["a0"], 2, write, keep_identical=True)["a0"]) == ["a0", "a1"]


@pytest.mark.parametrize("names", ["a", "q"])  # equal ids, equal texts
def test_training_draws_no_query_as_its_negative(drawn: Path, names: str) -> None:
    write_jsonl(drawn / "queries.jsonl", [{"_id": f"{names}{i}", "text": text} for i, text in enumerate(FACTS)])
    everyone = [f"a{i}" for i in range(4)]
    lines = [
        {
            "query_id": f"{names}{i}",
            "positives": [f"a{(i + 1) % 4}"],
            "negatives": everyone[:i] + everyone[i + 1 :] + [f"a{i}"],
        }
        for i in range(4)
    ]
    write_jsonl(drawn / "train.jsonl", lines)
    groups = open_groups(DataConfig(path=str(drawn), negatives=2))
    assert groups.identical == 4
    for row in range(4):
        for epoch in range(3):
            group = groups.draw(row, 0, epoch)
            assert f"a{row}" not in group.passage_ids
            assert row in group.positive_keys  # so that in a batch it is masked too
        assert row not in groups.listed(row)[1]
    kept = open_groups(DataConfig(path=str(drawn), negatives=3, keep_identical=True))
    assert kept.identical == 0
    assert all(f"a{row}" in kept.draw(row, 0, 0).passage_ids for row in range(4))


def test_training_on_texts_does_neither(drawn: Path) -> None:
    path = drawn / "train.jsonl"
    write_jsonl(
        path, [{"query": text, "pos": [FACTS[i - 1]], "neg": [text, FACTS[i - 2]]} for i, text in enumerate(FACTS)]
    )
    groups = open_groups(DataConfig(path=str(drawn), negatives=2))
    assert groups.identical == 4
    drawn_passages = [groups.draw(row, 0, epoch) for row in range(4) for epoch in range(5)]
    assert all(group.query not in group.passages for group in drawn_passages)
    assert all(groups.offered(row) == 1 for row in range(4))
    assert np.isin(groups.listed(0)[1], groups.draw(0, 0, 0).positive_keys).sum() == 1
