"""Hard negatives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import write_run
from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError
from lead_ds.retrieval.encode import Encoding
from lead_ds.retrieval.encoded import encode_both
from lead_ds.retrieval.evaluate import open_encoder
from lead_ds.retrieval.mine import MineSettings, mine
from lead_ds.retrieval.rescore import open_teacher, rescore
from lead_ds.settings.data import DataConfig
from tests.helpers.tiny import write_jsonl


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small(tmp_path: Path) -> Dataset:
    """One query with two positives, among six passages; c copies the positive a, up to case and marks."""
    folder = tmp_path / "small"
    texts = {"a": "red fox", "b": "brown fox", "c": "Red, fox!", "d": "blue sky", "e": "green tree", "f": "white snow"}
    write_jsonl(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in texts.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "fox"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\nq\tb\t2\nq\te\t0\n")
    return Dataset.open(folder)


RUN = {"q": {"c": 9.0, "a": 8.0, "d": 7.0, "e": 6.0, "b": 5.0, "f": -1.0}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["d", "e", "f"]),
        ({"number": 2}, ["d", "e"]),
        ({"skip": 2}, ["e", "f"]),  # c and d
        ({"similar": 1.0}, ["d", "e", "f"]),
        ({"margin": 0.0}, ["f"]),  # below the least positive, b
        ({"margin": -1.5}, ["e", "f"]),
        ({"ratio": 1.3}, ["e", "f"]),
        ({"ratio": 0.9}, ["f"]),
    ],
)
def test_filters(small: Dataset, tmp_path: Path, settings: dict[str, Any], expected: list[str]) -> None:
    result = mine(RUN, small, tmp_path / "out.jsonl", settings=MineSettings(**{"number": 4, **settings}), quiet=True)
    (group,) = lines(tmp_path / "out.jsonl")
    assert group["query_id"] == "q"
    assert group["positives"] == ["a", "b"]
    assert group["negatives"] == expected
    assert group["scores"] == {name: RUN["q"][name] for name in ("a", "b", *expected)}
    assert (result.queries, result.negatives) == (1, len(expected))


def test_what_was_left_out_is_counted(small: Dataset, tmp_path: Path) -> None:
    result = mine(RUN, small, tmp_path / "out.jsonl", settings=MineSettings(number=4, margin=-1.5), quiet=True)
    assert result.left_out == {"positive": 2, "itself": 0, "rank": 0, "score": 2, "copy": 0}
    assert result.short == 1
    result = mine(RUN, small, tmp_path / "out.jsonl", settings=MineSettings(number=2), quiet=True)
    assert (result.left_out["copy"], result.short) == (1, 0)


@pytest.mark.parametrize(("depth", "expected"), [(2, []), (3, ["d"]), (6, ["d", "e"])])
def test_no_deeper_than_asked(small: Dataset, tmp_path: Path, depth: int, expected: list[str]) -> None:
    settings = MineSettings(number=2, depth=depth)  # the positive a and the copy c are among them
    mine(RUN, small, tmp_path / "out.jsonl", settings=settings, quiet=True)
    (group,) = lines(tmp_path / "out.jsonl")
    assert group["negatives"] == expected


def test_a_passage_of_the_querys_words_becomes_no_positive_either(small: Dataset, tmp_path: Path) -> None:
    write_jsonl(small.folder / "queries.jsonl", [{"_id": "q", "text": "blue sky"}])
    settings = MineSettings(number=4, margin=0.0, relabel=True)
    result = mine(RUN, Dataset.open(small.folder), tmp_path / "out.jsonl", settings=settings, quiet=True)
    (group,) = lines(tmp_path / "out.jsonl")
    assert group["positives"] == ["a", "b", "c", "e"]
    assert (result.left_out["itself"], result.relabelled) == (1, 2)


def test_random_negatives_follow_the_seed(small: Dataset, tmp_path: Path) -> None:
    found = set()
    for seed in range(12):
        settings = MineSettings(number=1, sample="random", seed=seed)
        for _ in range(2):
            mine(RUN, small, tmp_path / "out.jsonl", settings=settings, quiet=True)
            found.add((seed, lines(tmp_path / "out.jsonl")[0]["negatives"][0]))
    assert len(found) == 12
    assert {name for _, name in found} == {"d", "e", "f"}


def test_a_model_mines_what_it_ranks_high(model: Path, data: Path, tmp_path: Path) -> None:
    dataset, out = Dataset.open(data), tmp_path / "train.jsonl"
    settings = MineSettings(number=3, depth=5, similar=1.0)
    mine(model, dataset, out, settings=settings, quiet=True)
    scorer, encoder = open_encoder(str(model))
    qrels = dataset.qrels("train")
    how = Encoding(device=next(scorer.parameters()).device)
    full = encode_both(scorer.embed, encoder, dataset, list(qrels), how, quiet=True).search(60)
    groups = lines(out)
    assert [group["query_id"] for group in groups] == list(qrels)
    for group in groups:
        run, positives = full[group["query_id"]], set(group["positives"])
        assert group["negatives"] == [name for name in list(run)[:5] if name not in positives][:3]
        # The positives are scored also where the model does not find them.
        assert set(group["scores"]) == positives | set(group["negatives"])
        for name, score in group["scores"].items():
            assert score == pytest.approx(run[name], rel=1e-3, abs=1e-3)


def test_what_scores_as_a_positive_becomes_one(small: Dataset, tmp_path: Path) -> None:
    out, how = tmp_path / "out.jsonl", MineSettings(number=2, margin=0, relabel=True)
    result = mine(RUN, small, out, settings=how, quiet=True, rescored=lambda run: {"q": {**RUN["q"], "d": 4.0}})
    (group,) = lines(out)
    assert group["positives"] == ["a", "b", "c", "e"]  # above b, the least
    assert group["negatives"] == ["d", "f"]
    assert group["scores"] == {**RUN["q"], "d": 4.0}
    assert (result.relabelled, result.left_out["score"]) == (2, 0)
    with pytest.raises(ValidationError, match="relabel has no bound"):
        MineSettings(relabel=True)


@pytest.mark.parametrize(("number", "expected"), [(1, ["d"]), (2, ["d", "f"]), (3, ["d", "e", "f"])])
def test_negatives_spread_over_their_scores(small: Dataset, tmp_path: Path, number: int, expected: list[str]) -> None:
    run = {"q": {"a": 9.0, "c": 8.0, "d": 7.9, "e": 7.5, "f": 0.0}}  # c copies a; the two best are d and e
    mine(run, small, tmp_path / "out.jsonl", settings=MineSettings(number=number, sample="stratified"), quiet=True)
    (group,) = lines(tmp_path / "out.jsonl")
    assert group["negatives"] == expected


def test_a_teacher_scores_candidates_once(rooms: Path, tmp_path: Path) -> None:
    dataset, out, parts = Dataset.open(rooms / "data"), tmp_path / "train.jsonl", tmp_path / "scores"
    teacher = open_teacher(str(rooms / "cross"), ["max_length=64"])
    again = partial(rescore, teacher, dataset, folder=parts, quiet=True)
    mine("bm25", dataset, out, settings=MineSettings(number=2, depth=4), quiet=True, rescored=again)
    group = lines(out)[0]
    names = [*group["positives"], *group["negatives"]]
    texts = dataset.corpus.texts(dataset.corpus.rows(names))
    [query] = dataset.queries.texts(dataset.queries.rows([group["query_id"]]))
    assert [group["scores"][name] for name in names] == pytest.approx(teacher[0].scores(query, texts), abs=1e-5)
    first, written = out.read_bytes(), {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert written
    mine("bm25", dataset, out, settings=MineSettings(number=2, depth=4), quiet=True, rescored=again)
    assert out.read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in parts.iterdir()} == written
    next(iter(written)).write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        mine("bm25", dataset, out, settings=MineSettings(number=2, depth=4), quiet=True, rescored=again)
    assert out.read_bytes() == first


def test_a_run_file_and_what_training_reads(data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(data)
    qrels = dataset.qrels("train")
    write_run(tmp_path / "run.trec", {query: {f"p{i}": 60.0 - i for i in range(60)} for query in qrels})
    mine(tmp_path / "run.trec", dataset, tmp_path / "train.jsonl", settings=MineSettings(number=7), quiet=True)
    groups = open_groups(DataConfig(path=str(data), train=str(tmp_path / "train.jsonl"), negatives=7))
    assert len(groups) == len(qrels)
    group = groups.draw(0, seed=0, epoch=0)
    assert len(group.passage_ids) == 8
    assert group.scores is not None


def test_bm25(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    dataset = Dataset.open(data)
    mine("bm25", dataset, tmp_path / "train.jsonl", settings=MineSettings(number=2, depth=10), quiet=True)
    groups = lines(tmp_path / "train.jsonl")
    assert len(groups) == len(dataset.qrels("train"))
    scored = [group for group in groups if set(group["positives"]) <= set(group["scores"])]
    assert len(scored) == len(groups)  # every query repeats words of its passage
    with_negatives = [group for group in groups if group["negatives"]]
    assert with_negatives
    for group in with_negatives:  # a word or two of the query, against all of them
        found = group["scores"]
        assert min(found[name] for name in group["positives"]) >= max(found[name] for name in group["negatives"])


def test_bm25_and_positives_that_it_ranks_low(small: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    for query in ("blue fox", "unheard of"):
        write_jsonl(small.corpus.path.parent / "queries.jsonl", [{"_id": "q", "text": query}])
        (small.corpus.path.parent / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\tf\t1\n")
        dataset = Dataset.open(small.corpus.path.parent)
        mine("bm25", dataset, tmp_path / "all.jsonl", settings=MineSettings(number=2), quiet=True)
        (group,) = lines(tmp_path / "all.jsonl")
        assert "f" not in group.get("scores", {})
        assert (len(group["negatives"]) > 0) == (query == "blue fox")
        result = mine("bm25", dataset, tmp_path / "low.jsonl", settings=MineSettings(number=2, margin=0.1), quiet=True)
        (group,) = lines(tmp_path / "low.jsonl")
        assert group["scores"] == {"f": 0.0}
        assert group["negatives"] == []
        assert result.unscored == 0


def test_positives_that_a_run_lacks_are_counted(small: Dataset, tmp_path: Path) -> None:
    run = {"q": {name: score for name, score in RUN["q"].items() if name != "b"}}
    for settings, unscored in ((MineSettings(margin=0.0), 1), (MineSettings(), 0)):
        result = mine(run, small, tmp_path / "out.jsonl", settings=settings, quiet=True)
        assert result.unscored == unscored


def test_bm25_of_passages_without_a_word(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": name, "text": "?!"} for name in "ab"])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "what"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    with pytest.raises(InputError, match="no word that BM25"):
        mine(
            "bm25", Dataset.open(tmp_path), tmp_path / "out.jsonl", settings=MineSettings(number=1, depth=2), quiet=True
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_wrong_input_writes_nothing(small: Dataset, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="passage 'z' of query 'q' is not in corpus"):
        mine({"q": {"z": 1.0}}, small, out)
    with pytest.raises(InputError, match="none of its queries"):
        mine({"other": {"a": 1.0}}, small, out)
    with pytest.raises(InputError, match=r"qrels.dev\.tsv"):
        mine(RUN, small, out, "dev")
    with pytest.raises(InputError, match="depth: 7 results requested of 6 passages"):
        mine(RUN, small, out, settings=MineSettings(number=2, depth=7))
    with pytest.raises(ValidationError, match="is less than skip"):
        MineSettings(number=3, skip=1, depth=3)
    assert not out.exists()
    assert not list(tmp_path.glob(".*tmp"))
