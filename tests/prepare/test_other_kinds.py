"""BEIR, TREC DL, MS MARCO documents and Hugging Face files, each in its published form."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from tests.prepare import official

Run = Callable[..., Path]

CORPUS = [
    {"_id": "d1", "title": "One", "text": "the first", "metadata": {"url": "x"}},
    {"_id": "d2", "title": "", "text": "the second"},
]
QUERIES = [{"_id": "q1", "text": "which is first", "metadata": {}}, {"_id": "q2", "text": "which is second"}]


def beir_zip(path: Path, qrels: str = "q1\td1\t1\nq2\td2\t2\n") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/corpus.jsonl", "".join(json.dumps(record) + "\n" for record in CORPUS))
        archive.writestr("tiny/queries.jsonl", "".join(json.dumps(record) + "\n" for record in QUERIES))
        archive.writestr("tiny/qrels/test.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
    return path


def test_a_beir_zip(tmp_path: Path, run: Run) -> None:
    dataset = Dataset.open(run("beir", beir_zip(tmp_path / "tiny.zip")))
    assert dataset.corpus.texts(range(2)) == ["One the first", "the second"]
    assert dataset.qrels("test") == {"q1": {"d1": 1}, "q2": {"d2": 2}}


def test_a_judged_passage_that_is_missing_is_told_or_dropped(tmp_path: Path, run: Run) -> None:
    source = beir_zip(tmp_path / "tiny.zip", "q1\td1\t1\nq2\tgone\t1\n")
    with pytest.raises(InputError, match="'gone'"):
        run("beir", source)
    assert Dataset.open(run("beir", source, drop_missing=True)).qrels("test") == {"q1": {"d1": 1}}


def test_documents_have_titles_and_texts(tmp_path: Path, run: Run) -> None:
    out = run("msmarco-doc", official.write(tmp_path / "src", official.document_files()))
    records = official.read(out / "corpus.jsonl")
    assert all(set(record) == {"_id", "title", "text"} for record in records)
    assert records[0]["_id"].startswith("D")
    assert Dataset.open(out).splits


def test_a_track_is_added_to_a_prepared_collection(tmp_path: Path, run: Run) -> None:
    out = run("msmarco-passage", official.write(tmp_path / "src", official.passage_files()))
    before = (out / "corpus.jsonl").read_bytes()
    track = official.write(
        tmp_path / "dl",
        {
            "msmarco-test2019-queries.tsv": b"1037798\twho is robert gray\n",
            "2019qrels-pass.txt": b"1037798 Q0 10 0\n1037798 Q0 7067032 3\n",
        },
    )
    assert run("trec-dl", track) == out
    assert (out / "corpus.jsonl").read_bytes() == before
    assert Dataset.open(out).qrels("dl19") == {"1037798": {"10": 0, "7067032": 3}}


def test_triplets_from_a_parquet_file(tmp_path: Path, run: Run) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install lead-ds[prepare]")
    rows = [{"query": "a", "positive": "b", "negative": "c"}, {"query": "d", "positive": "e", "negative": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    out = run("hf", tmp_path / "train.parquet")
    groups = official.read(out / "train.jsonl")
    texts = {record["_id"]: record["text"] for record in official.read(out / "corpus.jsonl")}
    assert [[texts[name] for name in group["positives"]] for group in groups] == [["b"], ["e"]]
    assert [[texts[name] for name in group["negatives"]] for group in groups] == [["c"], ["b"]]


def test_the_command_twice_and_on_a_foreign_folder(tmp_path: Path) -> None:
    source = beir_zip(tmp_path / "tiny.zip")
    first, second = (official.lead_ds("beir", source, tmp_path / "out") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "corpus.jsonl").write_text("mine\n")
    refused = official.lead_ds("beir", source, foreign)
    assert (refused.returncode, (foreign / "corpus.jsonl").read_text()) == (2, "mine\n")
    assert refused.stderr.count("\n") == 1
    assert "Traceback" not in refused.stderr
