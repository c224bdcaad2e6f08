"""Groups from memory are those that a file of the same records gives."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lead_ds.data.groups.open import open_groups
from lead_ds.data.groups.rows import RowGroups
from lead_ds.errors import InputError
from lead_ds.settings.data import DataConfig
from lead_ds.teachers.identity import data_facts
from tests.helpers.tiny import write_jsonl

ROWS = [
    {"query": f"q{i % 9}", "positives": [f"p{i}", f"r{i}"], "negatives": [f"n{i}", f"n{i + 1}", f"p{i}", f"r{i + 9}"]}
    for i in range(18)
]
COLUMNS = [{"anchor": f"q{i}", "positive": f"p{i}", "negative": f"n{i}", "label": i / 4} for i in range(12)]
PAIRS = [{"query": f"q{i // 3}", "passage": f"p{i}", "label": int(i % 3 == 0)} for i in range(12)]
FLAG = [
    {"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}"], "neg_scores": [0.5], "pos_scores": [2.0]} for i in range(9)
]
TEVATRON = [
    {
        "query_id": str(i),
        "query": f"q{i}",
        "positive_passages": [{"docid": f"d{i}", "title": "T", "text": f"p{i}"}],
        "negative_passages": [{"docid": f"e{i}", "text": f"n{i}"}],
    }
    for i in range(9)
]


def drawn(groups: Any) -> list[Any]:
    found = [groups.draw(row, seed, 1) for seed in range(4) for row in range(len(groups))]
    return [
        (g.query_id, g.query, g.passages, g.passage_ids, g.keys.tolist(), g.positive_keys.tolist(), repr(g.scores))
        for g in found
    ]


@pytest.mark.parametrize("rows", [ROWS, COLUMNS, PAIRS, FLAG, TEVATRON])
def test_rows_are_drawn_as_the_lines_of_a_file(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    write_jsonl(tmp_path / "train.jsonl", rows)
    of_file = open_groups(DataConfig(path=str(tmp_path), negatives=3))
    expected = drawn(of_file)
    for source in (rows, datasets.Dataset.from_list(rows)):
        groups = RowGroups.of(source, 3)
        assert drawn(groups) == expected
        assert groups.has_scores == of_file.has_scores
        assert drawn(pickle.loads(pickle.dumps(groups))) == expected
        for row in range(len(groups)):
            (query, keys), (query_of_file, keys_of_file) = groups.listed(row), of_file.listed(row)
            assert (query, keys.tolist()) == (query_of_file, keys_of_file.tolist())
            assert groups.offered(row) == of_file.offered(row)


def test_scores_stand_beside_their_passages() -> None:
    rows = [{"query": "q", "positives": ["a", "b"], "negatives": ["c"], "scores": [3, 2.5, -1]}, {**ROWS[0]}]
    groups = RowGroups.of(rows, 1)
    table = {"a": 3, "b": 2.5, "c": -1}
    for seed in range(10):
        group = groups.draw(0, seed, 0)
        assert group.scores is not None
        assert group.scores.tolist() == [table[text] for text in group.passages]
    assert np.isnan(groups.draw(1, 0, 0).scores).all()


def test_positives_of_equal_queries_are_known() -> None:
    rows = [
        {"query": "one", "positives": ["a"], "negatives": ["b", "c"]},
        {"query": "one", "positives": ["b"], "negatives": []},
        {"query": "two", "positives": ["d"], "negatives": []},
    ]
    groups = RowGroups.of(rows, 1)
    for seed in range(20):
        assert groups.draw(0, seed, 0).passages == ["a", "c"]
        assert groups.draw(1, seed, 0).passages[1] in ("c", "d")
    assert len(groups.draw(1, 0, 0).positive_keys) == 2


def test_other_rows_have_another_checksum() -> None:
    first = RowGroups.of(ROWS, 3)
    assert data_facts(first) == data_facts(RowGroups.of(json.loads(json.dumps(ROWS)), 3))
    for change in (
        {"query": "other"},
        {"positives": ["other"]},
        {"negatives": ["other"]},
        {"scores": [1, 2, 3, 4, 5, 6]},
    ):
        changed = [*ROWS[:-1], {**ROWS[-1], **change}]
        assert data_facts(RowGroups.of(changed, 3)) != data_facts(first)
    assert data_facts(RowGroups.of(ROWS[::-1], 3)) != data_facts(first)


GOOD = {"query": "q", "positives": ["a"], "negatives": ["b", "c"]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"query": 3}, r"data\[1\]: no text in the field 'query'"),
        ({"positives": []}, r"data\[1\]: query 'q' has no positive"),
        ({"positives": "a"}, r"data\[1\]: the field 'positives' is not a list of texts"),
        ({"negatives": [3]}, r"data\[1\]: the field 'negatives' is not a list of texts"),
        ({"scores": [1, 2]}, r"data\[1\]: the field 'scores' is not one number for each"),
        ({"scores": {"a": 1}}, r"data\[1\]: the field 'scores' is not one number for each"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        RowGroups.of([GOOD, GOOD | change, GOOD], 1)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([], "data: holds no groups"),
        ("data/x", "data: a str is not a list of rows"),
        (iter(ROWS), "is not a list of rows"),
        ([GOOD, "text"], r"data\[1\]: is a str, not a dictionary"),
        ([{"text": "a", "url": 3}], r"data\[0\]: no known format of groups has the fields 'text', 'url'"),
        ([{"query_id": "1", "positives": ["p1"]}], r"data\[0\]: no known format"),
        ([GOOD], "3 different passages are too few for 3 negatives"),
    ],
)
def test_what_is_no_set_of_rows_is_refused(rows: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        RowGroups.of(rows, 3)
