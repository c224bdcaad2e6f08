import gzip
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lead_ds.data.groups.drawing import Draw
from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError
from lead_ds.io import mapped
from lead_ds.settings.data import DataConfig
from tests.helpers.tiny import write_jsonl


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def opened(folder: Path) -> Callable[..., Any]:
    def make(groups: list[dict[str, Any]] | None = None, **settings: Any) -> Any:
        if groups is not None:
            write_jsonl(folder / "train.jsonl", groups)
        return open_groups(DataConfig(path=str(folder), **settings))

    return make


def test_draws_are_random_integers() -> None:
    draw = Draw(1, 2, 3)
    counts = Counter(draw.below(7) for _ in range(70_000))
    assert sorted(counts) == list(range(7))
    assert max(abs(count - 10_000) for count in counts.values()) < 500  # five deviations
    assert Draw(1, 2, 3).below(1 << 60) == Draw(1, 2, 3).below(1 << 60)
    assert len({Draw(a, b, c).below(1 << 60) for a in range(5) for b in range(5) for c in range(5)}) == 125
    first = Counter(next(Draw(s).shuffled(5)) for s in range(5000))
    assert max(abs(count - 1000) for count in first.values()) < 150
    assert sorted(Draw(9).shuffled(100)) == list(range(100))
    pairs = Counter(tuple(Draw(s, 1).shuffled(3)) for s in range(6000))
    assert len(pairs) == 6
    assert max(abs(count - 1000) for count in pairs.values()) < 150


def test_a_group_holds_texts_ids_and_scores_of_its_line(folder: Path, opened: Callable[..., Any]) -> None:
    lines, groups = records(folder / "train.jsonl"), opened(negatives=4)
    corpus = {record["_id"]: record for record in records(folder / "corpus.jsonl")}
    queries = {record["_id"]: record["text"] for record in records(folder / "queries.jsonl")}
    assert len(groups) == len(lines)
    assert groups.has_scores
    for row, line in enumerate(lines):
        group = groups.draw(row, seed=3, epoch=1)
        assert group.query_id == line["query_id"]
        assert group.query == queries[line["query_id"]]
        assert group.passage_ids[0] in line["positives"]
        assert set(group.passage_ids[1:]) < set(line["negatives"])
        assert len(set(group.passage_ids)) == 5
        found = [corpus[name] for name in group.passage_ids]
        assert group.passages == [(passage["title"] + " " + passage["text"]).strip() for passage in found]
        assert group.keys.tolist() == [int(name[1:]) for name in group.passage_ids]
        assert group.positive_keys.tolist() == [int(name[1:]) for name in line["positives"]]
        assert group.scores.tolist() == pytest.approx([line["scores"][name] for name in group.passage_ids])


def test_draws_depend_on_seed_epoch_and_row_alone(opened: Callable[..., Any]) -> None:
    groups, again = opened(negatives=3), opened(negatives=3)

    def drawn(source: Any, seed: int, epoch: int) -> list[list[str]]:
        return [source.draw(row, seed, epoch).passage_ids for row in range(len(source))]

    expected = drawn(groups, 1, 0)
    assert [again.draw(row, 1, 0).passage_ids for row in reversed(range(len(again)))] == expected[::-1]
    assert drawn(pickle.loads(pickle.dumps(groups)), 1, 0) == expected
    assert drawn(groups, 2, 0) != expected
    assert drawn(groups, 1, 1) != expected


def test_every_listed_passage_is_drawn_equally_often(opened: Callable[..., Any]) -> None:
    line = {"query_id": "q0", "positives": ["p0", "p1", "p2"], "negatives": [f"p{i}" for i in range(10, 20)]}
    groups = opened([line], negatives=2)
    drawn = [groups.draw(0, seed, 0).passage_ids for seed in range(3000)]
    positives = Counter(ids[0] for ids in drawn)
    negatives = Counter(name for ids in drawn for name in ids[1:])
    assert sorted(positives) == line["positives"]
    assert sorted(negatives) == line["negatives"]
    assert max(abs(count - 1000) for count in positives.values()) < 130
    assert max(abs(count - 600) for count in negatives.values()) < 110


def test_missing_negatives_are_passages_of_the_corpus_that_are_no_positive(opened: Callable[..., Any]) -> None:
    line = {"query_id": "q0", "positives": ["p0", "p1"], "negatives": ["p5", "p5", "p1", "p9"], "scores": {"p9": 2}}
    groups = opened([line], negatives=20)
    seen = set()
    for seed in range(200):
        group = groups.draw(0, seed, 0)
        assert group.passage_ids[0] in ("p0", "p1")
        assert set(group.passage_ids[1:3]) == {"p5", "p9"}  # those listed come first, each once
        assert len(set(group.passage_ids)) == 21
        assert not {"p0", "p1"} & set(group.passage_ids[1:])
        assert group.scores[group.passage_ids.index("p9")] == 2
        assert np.isnan(group.scores).sum() == 20
        seen |= set(group.passage_ids)
    assert len(seen) == 60


def test_positives_of_all_lines_of_a_query_are_known(opened: Callable[..., Any]) -> None:
    lines = [
        {"query_id": "q0", "positives": ["p0"], "negatives": ["p2", "p3"]},
        {"query_id": "q1", "positives": ["p1"], "negatives": ["p3", "p4"]},
        {"query_id": "q0", "positives": ["p2", "p0"], "negatives": ["p3"]},
    ]
    groups = opened(lines, negatives=1)
    assert groups.draw(0, 0, 0).positive_keys.tolist() == [0, 2]
    assert groups.draw(1, 0, 0).positive_keys.tolist() == [1]
    assert groups.draw(2, 0, 0).positive_keys.tolist() == [0, 2]
    assert not groups.has_scores
    for seed in range(20):
        assert groups.draw(0, seed, 0).passage_ids == ["p0", "p3"]  # p2 answers q0, says the third line


def test_groups_from_judgements(folder: Path, opened: Callable[..., Any]) -> None:
    path = folder / "qrels" / "more.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq5\tp3\t1\nq2\tp9\t2\nq5\tp1\t0\nq5\tp4\t1\n")
    groups = opened(train="qrels/more.tsv", negatives=6)
    assert [groups.draw(row, 0, 0).query_id for row in range(len(groups))] == ["q5", "q2"]
    drawn = [groups.draw(0, seed, 0) for seed in range(100)]
    assert {group.passage_ids[0] for group in drawn} == {"p3", "p4"}
    assert not {"p3", "p4"} & {name for group in drawn for name in group.passage_ids[1:]}
    assert drawn[0].scores is None
    assert groups.draw(1, 0, 0).positive_keys.tolist() == [9]


def test_gz_and_absolute_paths(folder: Path, tmp_path: Path, opened: Callable[..., Any]) -> None:
    expected = opened().draw(3, 0, 0).passage_ids
    elsewhere = tmp_path / "groups.jsonl.gz"
    elsewhere.write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    assert opened(train=str(elsewhere)).draw(3, 0, 0).passage_ids == expected


def test_the_index_of_groups_is_rebuilt_when_the_corpus_changes(
    folder: Path, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "MIN_CACHED_BYTES", 0)
    expected = opened().draw(3, 0, 0)
    again = opened().draw(3, 0, 0)
    assert again.passage_ids == expected.passage_ids
    assert again.scores.tolist() == expected.scores.tolist()
    assert list(folder.glob(".train.jsonl.canonical.idx"))
    write_jsonl(folder / "corpus.jsonl", records(folder / "corpus.jsonl")[::-1])
    reversed_corpus = opened().draw(3, 0, 0)
    assert reversed_corpus.passage_ids == expected.passage_ids
    assert reversed_corpus.passages == expected.passages
    assert reversed_corpus.keys.tolist() == [59 - key for key in expected.keys]


GOOD = {"query_id": "q0", "positives": ["p0"], "negatives": ["p1"]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"query_id": "q99"}, "query 'q99' is not in queries.jsonl"),
        ({"positives": ["p0", "p99"]}, "passage 'p99' is not in corpus.jsonl"),
        ({"negatives": ["p1", "", "p2"]}, "passage '' is not in corpus.jsonl"),
        ({"positives": []}, "query 'q0' has no positive"),
        ({"positives": "p0"}, "'positives' is not a list of ids"),
        ({"negatives": [["p1"]]}, "'negatives' is not a list of ids"),
        ({"scores": [1.0]}, "'scores' does not map ids to numbers"),
        ({"scores": {"p0": "1"}}, "'scores' does not map ids to numbers"),
        ({"query_id": None, "positives": None}, "'positives' is not a list of ids"),
    ],
)
def test_a_bad_group_is_named(folder: Path, opened: Callable[..., Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        opened([GOOD, GOOD, GOOD | change, GOOD])
    assert caught.value.where == f"{folder / 'train.jsonl'}:3"


@pytest.mark.parametrize("field", ["query_id", "positives"])
def test_a_missing_field_is_named(opened: Callable[..., Any], field: str) -> None:
    with pytest.raises(InputError, match=f":2: no field '{field}'"):
        opened([GOOD, {name: value for name, value in GOOD.items() if name != field}])


def test_a_judgement_without_a_text_is_named(folder: Path, opened: Callable[..., Any]) -> None:
    path = folder / "qrels" / "train.tsv"
    path.write_text(path.read_text() + "q1\tp99\t0\nq1\tp77\t1\n")
    with pytest.raises(InputError, match=r"passage 'p77' is not in corpus.jsonl") as caught:
        opened(train="qrels/train.tsv")
    assert caught.value.where == f"{path}:21"
    path.write_text("query-id\tcorpus-id\tscore\nq1\tp9\t0\n")
    with pytest.raises(InputError, match="holds no groups"):
        opened(train="qrels/train.tsv")


def test_files_without_groups(folder: Path, opened: Callable[..., Any]) -> None:
    for form in ("auto", "canonical", "tevatron", "flagembedding", "sentence-transformers"):
        with pytest.raises(InputError, match=r"train.jsonl: holds no groups"):
            opened([], format=form)
    with pytest.raises(InputError, match=r":1: no known format .* 'text', 'url'"):
        opened([{"text": "a", "url": 3}])
    with pytest.raises(InputError, match=r"absent.jsonl: no such file"):
        opened(train="absent.jsonl")
    with pytest.raises(InputError, match="no such folder"):
        open_groups(DataConfig(path=str(folder / "absent")))


def test_a_corpus_too_small_for_the_negatives(opened: Callable[..., Any]) -> None:
    many = {"query_id": "q0", "positives": [f"p{i}" for i in range(50)], "negatives": []}
    assert len(opened([many] * 3, negatives=10).draw(0, 0, 0).passages) == 11
    with pytest.raises(InputError, match="60 passages are too few for 11 negatives"):
        opened([many], negatives=11)


TEVATRON = {
    "query_id": "7",
    "query": "one",
    "positive_passages": [{"docid": "a", "title": "T", "text": "x"}, {"docid": "b", "text": "y"}],
    "negative_passages": [{"docid": "c", "title": "", "text": "z"}],
}
FLAG = {"query": "one", "pos": ["x", "y"], "neg": ["z", "w"], "pos_scores": [3.0, 2], "neg_scores": [0.5, 0.25]}
FILLER = [f"text {i}" for i in range(8)]


def texts_of(group: Any) -> tuple[str, list[str]]:
    return group.query, group.passages


def test_tevatron(opened: Callable[..., Any]) -> None:
    other = TEVATRON | {"query_id": 8, "query": "two", "positive_passages": [{"docid": "c", "text": "z"}]}
    groups = opened([TEVATRON, other], negatives=1)
    group = groups.draw(0, 0, 0)
    assert (group.query_id, groups.draw(1, 0, 0).query_id) == ("7", "8")
    assert {tuple(texts_of(groups.draw(0, s, 0))[1]) for s in range(20)} == {("T x", "z"), ("y", "z")}
    assert group.passage_ids[1] == "c"
    assert group.keys[1] == groups.draw(1, 0, 0).keys[0]  # c is the positive of the other query: the same passage
    assert len(group.positive_keys) == 2
    # The second line's only negative is its positive: the negative comes from the first line.
    assert {groups.draw(1, s, 0).passages[1] for s in range(30)} == {"T x", "y"}
    assert group.scores is None


def test_tevatron_scores(opened: Callable[..., Any]) -> None:
    scored = {
        **TEVATRON,
        "positive_passages": [{"docid": "a", "text": "x", "score": 2.5}],
        "negative_passages": [{"docid": "c", "text": "z", "score": 1}, {"docid": "d", "text": "w", "score": None}],
    }
    group = opened([scored], negatives=2).draw(0, 0, 0)
    found = dict(zip(group.passage_ids, group.scores.tolist(), strict=True))
    assert (found["a"], found["c"]) == (2.5, 1)
    assert np.isnan(found["d"])
    scored["negative_passages"][0]["score"] = "1"
    with pytest.raises(InputError, match=r":1: a 'score' in 'negative_passages' is not a number"):
        opened([scored], negatives=1)


def test_flagembedding_with_a_prompt_that_is_no_text(opened: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r":1: the field 'prompt' is not a text"):
        opened([FLAG | {"prompt": 3}])


def test_flagembedding(opened: Callable[..., Any]) -> None:
    groups = opened([FLAG | {"prompt": "ask: "}], negatives=2)
    group = groups.draw(0, 0, 0)
    assert group.query == "ask: one"
    table = dict(zip([*FLAG["pos"], *FLAG["neg"]], [*FLAG["pos_scores"], *FLAG["neg_scores"]], strict=True))
    for seed in range(10):
        group = groups.draw(0, seed, 0)
        assert group.passages[0] in FLAG["pos"]
        assert sorted(group.passages[1:]) == ["w", "z"]
        assert group.scores.tolist() == [table[text] for text in group.passages]
    borrowing = opened(
        [FLAG | {"neg": [], "neg_scores": []}, FLAG | {"query": "two", "pos": ["v"], "pos_scores": [1]}], negatives=3
    )
    for seed in range(10):  # the other line's scores are of another query
        assert np.isnan(borrowing.draw(0, seed, 0).scores).tolist() == [False, True, True, True]
    plain = {"query": "one", "pos": ["x"], "neg": ["z", "w"], "pos_scores": None}
    assert opened([plain], negatives=2).draw(0, 0, 0).scores is None


@pytest.mark.parametrize(
    ("record", "passages", "scores"),
    [
        ({"anchor": "q", "positive": "a", "negative": "b"}, ["a", "b"], None),
        ({"negative": "b", "positive": "a", "question": "q"}, ["a", "b"], None),
        ({"query": "q", "answer": "a", "other": "b"}, ["a", "b"], None),
        ({"query": "q", "positive": "a", "negative": "b", "label": 2.5}, ["a", "b"], [0, -2.5]),
        ({"query": "q", "positive": "a", "negative": "b", "scores": [3, 0.5]}, ["a", "b"], [3, 0.5]),
        ({"query": "q", "documents": ["b", "a"], "labels": [0, 1]}, ["a", "b"], None),
    ],
)
def test_sentence_transformers_columns(
    opened: Callable[..., Any], record: dict[str, Any], passages: list[str], scores: list[float] | None
) -> None:
    group = opened([record], negatives=1).draw(0, 0, 0)
    assert texts_of(group) == ("q", passages)
    assert (None if group.scores is None else group.scores.tolist()) == scores


def test_sentence_transformers_tuples_keep_each_score_with_its_passage(opened: Callable[..., Any]) -> None:
    record = {"anchor": "q", "positive": "a"} | {f"negative_{i}": f"n{i}" for i in (10, 9, 2, 1)}
    for labels, expected in (
        ([9, 1, 2, 3, 4], {"a": 9, "n1": 1, "n2": 2, "n9": 3, "n10": 4}),
        ([1, 2, 3, 4], {"a": 0, "n1": -1, "n2": -2, "n9": -3, "n10": -4}),
    ):
        group = opened([record | {"label": labels}], negatives=4).draw(0, 0, 0)
        assert dict(zip(group.passages, group.scores.tolist(), strict=True)) == expected


def test_sentence_transformers_labelled_pairs_are_grouped_by_query(opened: Callable[..., Any]) -> None:
    pairs = [("one", "a", 1), ("one", "b", 0), ("one", "c", 0), ("two", "d", 0), ("two", "e", 1.0)]
    lines = [{"query": query, "passage": passage, "label": label} for query, passage, label in pairs]
    groups = opened(lines, negatives=2)
    assert len(groups) == 2
    assert groups.draw(0, 0, 0).passages[0] == "a"
    assert set(groups.draw(0, 0, 0).passages[1:]) == {"b", "c"}
    second = groups.draw(1, 0, 0)
    assert second.passages[:2] == ["e", "d"]
    assert second.passages[2] in ("a", "b", "c")
    with pytest.raises(InputError, match=":6: query 'three' has no positive"):
        opened([*lines, {"query": "three", "passage": "f", "label": 0}])


def test_pairs_take_negatives_from_other_lines(opened: Callable[..., Any]) -> None:
    lines = [{"query": f"q{i % 4}", "answer": text} for i, text in enumerate(FILLER)]
    groups = opened(lines, negatives=6)
    for seed in range(10):
        group = groups.draw(1, seed, 0)
        assert group.passages[0] == "text 1"
        assert sorted(group.passages[1:]) == [text for text in FILLER if text not in ("text 1", "text 5")]
    with pytest.raises(InputError, match="8 different passages are too few for 7 negatives"):
        opened(lines, negatives=7)


def test_text_groups_draw_the_same_again(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"query": f"q{i}", "pos": [f"p{i}", f"r{i}"], "neg": FILLER} for i in range(20)]
    groups = opened(lines, negatives=4)
    expected = [groups.draw(row, 5, 2).passages for row in range(20)]
    monkeypatch.setattr(mapped, "MIN_CACHED_BYTES", 0)
    built, kept = opened(negatives=4), opened(negatives=4)
    for again in (built, kept, pickle.loads(pickle.dumps(groups))):
        assert [again.draw(row, 5, 2).passages for row in range(20)] == expected
    assert [groups.draw(row, 5, 3).passages for row in range(20)] != expected


@pytest.mark.parametrize(
    ("first", "bad", "what"),
    [
        (TEVATRON, TEVATRON | {"positive_passages": []}, "has no positive"),
        (TEVATRON, TEVATRON | {"positive_passages": [{"docid": "a"}]}, "'positive_passages' is not a list of passages"),
        (TEVATRON, {"query_id": "1", "positive_passages": []}, "no field 'query'"),
        (FLAG, FLAG | {"pos": "x"}, "'pos' is not a list of texts"),
        (FLAG, FLAG | {"neg_scores": [1.0]}, "'neg_scores' is not one number below 3e38 for each text"),
        (FLAG, FLAG | {"query": 3}, "no text in the field 'query'"),
        ({"query": "a", "positive": "b"}, {"query": "a", "positive": None}, "the column 'positive' is not a text"),
        ({"query": "a", "positive": "b"}, {"query": "a"}, "the column 'positive' is not a text"),
        (
            {"q": "a", "p": "b", "n": "c", "label": [1]},
            {"q": "a", "p": "b", "n": "c", "label": [1, 2, 3]},
            "3 labels for 2",
        ),
        ({"q": "a", "p": "b", "n": "c", "label": [1]}, {"q": "a", "p": "b", "n": "c"}, "'label' is not a number"),
        ({"q": "a", "p": ["b"], "labels": [1]}, {"q": "a", "p": ["b"], "labels": [1, 0]}, "2 labels for 1 passages"),
    ],
)
def test_a_bad_line_of_a_foreign_format_is_named(
    folder: Path, opened: Callable[..., Any], first: dict[str, Any], bad: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=what) as caught:
        opened([first, bad])
    assert caught.value.where == f"{folder / 'train.jsonl'}:2"


def test_pairs_with_scores_alone_are_refused(opened: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=":1: pairs with a score and no label"):
        opened([{"query": "a", "passage": "b", "score": 0.3}])


FEW = {name: value for name, value in GOOD.items() if name != "negatives"}
PASSAGE = {"doc_id": "a", "text": "x"}


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        (FEW | {"negativs": ["p1"]}, "negatives"),
        (GOOD | {"score": {"p0": 1.0}}, "scores"),
        (TEVATRON | {"positive_passages": [PASSAGE]}, "docid"),
        ({"query": "a", "pos": ["x"], "Neg": ["z"]}, "neg"),
        ({"query": "a", "positive": "b", "negative": "c", "lable": 0.5}, "label"),
    ],
)
def test_a_misspelt_field_is_named(opened: Callable[..., Any], bad: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=rf"jsonl:1: the field .* is none that is read \(did you mean '{key}'\?"):
        opened([bad])
    assert opened([GOOD | {"answers": ["x"], "query": "y"}])  # fields of one's own are let alone
