"""What a writer writes, its reader reads back equal; what cannot be read back is refused before it is written."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_run, write_run
from lead_ds.data.collections.texts import Texts
from lead_ds.data.groups.open import open_groups
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.tokenizer import load_tokenizer
from lead_ds.errors import InputError, LeadError
from lead_ds.io.files import read_json, write_json
from lead_ds.io.mapped import read_arrays, write_arrays
from lead_ds.prepare.build import prepare
from lead_ds.prepare.manifest import read_manifest
from lead_ds.prepare.source import Judgement, Part, Source, Text
from lead_ds.retrieval.encode import MANIFEST, encode_to
from lead_ds.retrieval.vectors import Vectors
from lead_ds.settings.data import DataConfig
from tests.helpers.tiny import tiny_tokenizer, write_jsonl

quietly = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
# No halves of characters: no file of text can hold them, and none is read from one.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
IDS = WORDS | st.sampled_from(["a", "b", "007", "1e3", "é", "a\u3000b", " x", "q\u2028", "NA", "\x85", "a\tb"])
FLOATS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, 0.1, 1e-45, 3.4e38])


def part(records: list[Any]) -> Part[Any]:
    return Part(lambda tick: iter(records), len(records), "rows", {"records": repr(records)})


@quietly
@given(st.dictionaries(IDS, st.dictionaries(IDS, FLOATS, min_size=1, max_size=4), min_size=1, max_size=4), IDS)
def test_runs(run: dict[str, dict[str, float]], tag: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.trec.gz"
        try:
            write_run(path, run, tag)
        except InputError:
            names = [tag, *run, *(name for found in run.values() for name in found)]
            scores = [score for found in run.values() for score in found.values()]
            assert any(name.split() != [name] for name in names) or not all(map(math.isfinite, scores))
            assert not path.exists()
        else:
            assert read_run(path) == run


@quietly
@given(
    st.lists(st.tuples(IDS, WORDS, WORDS), min_size=1, max_size=5, unique_by=lambda text: text[0]),
    st.lists(st.tuples(IDS, WORDS), min_size=1, max_size=4, unique_by=lambda text: text[0]),
    st.integers(0, 3),
)
def test_prepared_collections(passages: list[tuple[str, str, str]], queries: list[tuple[str, str]], grade: int) -> None:
    judged = {query: {passages[i % len(passages)][0]: grade} for i, (query, _) in enumerate(queries)}
    judged[queries[0][0]][passages[0][0]] = 1
    pairs = [Judgement("x:1", q, p, score) for q, found in judged.items() for p, score in found.items()]
    source = Source(
        "hf",
        "made",
        queries=part([Text(name, "", text) for name, text in queries]),
        corpus=part([Text(*passage) for passage in passages]),
        qrels={"train": part(pairs)},
        train="train",
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            prepare(source, out, shown=False)
        except InputError:
            names = [passage[0] for passage in passages] + [query[0] for query in queries]
            assert any(name != name.strip() or not name or {"\t", "\n", "\r"} & set(name) for name in names)
            return
        dataset = Dataset.open(out)
        assert list(dataset.corpus.ids) == [name for name, _, _ in passages]
        assert [dataset.corpus.body(row) for row in range(len(passages))] == [text for _, _, text in passages]
        assert dataset.queries.texts(range(len(queries))) == [text for _, text in queries]
        assert dataset.qrels("train") == judged
        assert set(read_manifest(out)["files"]) == {"queries.jsonl", "corpus.jsonl", "qrels/train.tsv", "train.jsonl"}
        positive = {query: {p for p, score in found.items() if score > 0} for query, found in judged.items()}
        groups = open_groups(DataConfig(path=str(out), negatives=0, keep_identical=True))
        drawn = [groups.draw(row, 0, 0) for row in range(len(groups))]
        assert {group.query_id for group in drawn} == {query for query, found in positive.items() if found}
        assert all(group.passage_ids[0] in positive[group.query_id] for group in drawn)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 62), 1 << 62) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@quietly
@given(st.dictionaries(WORDS, JSON, max_size=4))
def test_manifests(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        try:
            write_json(path, tree)
        except LeadError:
            with pytest.raises(ValueError, match="JSON compliant"):
                json.dumps(tree, allow_nan=False)
            assert not path.exists()
        else:
            assert read_json(path, "") == tree


@quietly
@given(st.lists(st.lists(st.integers(-5, 5), max_size=4), min_size=1, max_size=3), WORDS)
def test_kept_arrays(values: list[list[int]], name: str) -> None:
    arrays = {f"{name}{i}": np.array(row, np.int64) for i, row in enumerate(values)}
    with tempfile.TemporaryDirectory() as folder:
        write_arrays(Path(folder) / "x", {"key": name}, arrays)
        found = read_arrays(Path(folder) / "x", {"key": name})
        assert found is not None
        assert {key: row.tolist() for key, row in found.items()} == {key: row.tolist() for key, row in arrays.items()}
        assert read_arrays(Path(folder) / "x", {"key": name + "x"}) is None


@pytest.mark.parametrize("name", ["a b", "a\u3000b", " x", "q\u2028", "a\tb", "\x85"])
def test_vectors_keep_ids_that_are_lines(name: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "p", "text": "owl"}, {"_id": name, "text": "the owl"}])
    tokenizer = load_tokenizer(str(tiny_tokenizer(tmp_path / "model", "wordpiece")))
    encoder = TextEncoder("model", tokenizer, query_length=32, passage_length=128)
    corpus = Texts.open(tmp_path / "corpus.jsonl", "corpus")
    encode_to(tmp_path / "out", lambda tokens: torch.ones(len(tokens["input_ids"]), 4), encoder, corpus, {})
    assert list(Vectors.open(tmp_path / "out").ids()) == ["p", name]
    assert read_json(tmp_path / "out" / MANIFEST, "")["count"] == 2
