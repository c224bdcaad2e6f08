"""Groups of which only passages with a score are drawn, in every format; those with too few are refused with their line."""

from __future__ import annotations

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
from tests.helpers.tiny import write_jsonl


def canonical(positives: list[str], negatives: list[str], scores: dict[str, float], query: str = "q1") -> Any:
    return {"query_id": query, "positives": positives, "negatives": negatives, "scores": scores}


def texts(pos: list[float | None], neg: list[float | None], query: str = "one") -> Any:
    """A line of Tevatron's, with texts named by their place."""
    lists = {"yes": pos, "no": neg}
    passages = {
        name: [{"text": f"{query} {name} {i}", "score": score} for i, score in enumerate(scores)]
        for name, scores in lists.items()
    }
    return {"query": query, "positive_passages": passages["yes"], "negative_passages": passages["no"]}


def opened(folder: Path, lines: list[Any], negatives: int) -> Any:
    write_jsonl(folder / "train.jsonl", lines)
    return open_groups(DataConfig(path=str(folder), negatives=negatives))


def test_only_scored_passages_are_drawn_of_ids(folder: Path) -> None:
    scores = {"p0": 4.0, "p5": 1.0, "p6": 2.0, "p8": 0.0}
    every = opened(folder, [canonical(["p0", "p1"], ["p5", "p6", "p7", "p8"], scores)], 2)
    groups = every.scored()
    for twin in (groups, pickle.loads(pickle.dumps(groups))):
        drawn = [twin.draw(0, seed, 0) for seed in range(60)]
        assert {name for group in drawn for name in group.passage_ids} == {"p0", "p5", "p6", "p8"}
        for group in drawn:
            assert group.scores.tolist() == [scores[name] for name in group.passage_ids]
            assert len(group.positive_keys) == 2, "the positive without a score is known still"
        assert twin.offered(0) == 3
        assert len(twin.pool(0).keys) == 4
    assert {name for seed in range(60) for name in every.draw(0, seed, 0).passage_ids} > {"p1", "p7"}


def test_only_scored_passages_are_drawn_of_texts(folder: Path) -> None:
    lines = [texts([3.0, None], [1.0, 0.5, None, 0.25]), texts([1.0], [0.1, 0.2, 0.3], "two")]
    for groups in (opened(folder, lines, 2).scored(), RowGroups.of(lines, 2).scored()):
        for twin in (groups, pickle.loads(pickle.dumps(groups))):
            drawn = [twin.draw(0, seed, 0) for seed in range(60)]
            assert all(np.isfinite(group.scores).all() for group in drawn)
            assert {text for group in drawn for text in group.passages} == {
                "one yes 0",
                "one no 0",
                "one no 1",
                "one no 3",
            }
            assert twin.offered(0) == 3


GOOD = canonical(["p0"], ["p5", "p6"], {"p0": 1, "p5": 1, "p6": 1})
PLAIN = [{"query": "a", "positive": "b", "negative": "c"}, {"query": "d", "positive": "e", "negative": "f"}]
# A positive of another line that asks the same is no negative.
ASKED_AGAIN = [
    canonical(["p0"], ["p5", "p1"], {"p0": 1, "p5": 1, "p1": 1}),
    canonical(["p1"], ["p5", "p6"], {"p1": 1, "p5": 0, "p6": 1}),
]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([canonical(["p0"], ["p5"], {})], r"train\.jsonl: holds no scores .*teacher\.kind"),
        (PLAIN, "holds no scores"),
        ([GOOD, canonical(["p1"], ["p5", "p6"], {"p5": 1, "p6": 0}, "q2")], ":3: no positive has a score"),
        (
            [GOOD, canonical(["p1"], ["p5", "p6"], {"p1": 1, "p6": 0}, "q2")],
            r":3: 1 negatives have a score, 2 are drawn .*lower data\.negatives",
        ),
        (ASKED_AGAIN, ":1: 1 negatives have a score"),
        ([texts([1.0], [1.0, 2.0]), texts([1.0], [1.0, None], "two")], ":3: 1 negatives have a score, 2 are drawn"),
        ([texts([1.0], [1.0, 2.0]), texts([None], [1.0, 3.0], "two")], ":3: no positive has a score"),
    ],
)
def test_groups_without_enough_scores_are_refused_with_their_line(folder: Path, lines: list[Any], told: str) -> None:
    path = folder / "train.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")  # a blank line between
    groups = open_groups(DataConfig(path=str(folder), negatives=2 if "holds" not in told else 1))
    with pytest.raises(InputError, match=told):
        groups.scored()


def test_a_repeated_negative_counts_once_and_the_query_itself_not_at_all(folder: Path) -> None:
    line = texts([1.0], [1.0, 2.0, 3.0])
    line["negative_passages"][1]["text"] = line["negative_passages"][0]["text"]
    line["negative_passages"][2]["text"] = line["query"]
    others = texts([1.0], [1.0, 2.0, 3.0], "two")
    with pytest.raises(InputError, match=":1: 1 negatives have a score, 2 are drawn"):
        opened(folder, [line, others], 2).scored()
    write_jsonl(folder / "train.jsonl", [line, others])
    assert open_groups(DataConfig(path=str(folder), negatives=2, keep_identical=True)).scored().offered(0) == 2
    with pytest.raises(InputError, match=r"data\[0\]: 1 negatives have a score"):
        RowGroups.of([line, others], 2).scored()


def test_a_file_whose_rows_are_all_right_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = opened(folder, [texts([1.0], [1.0, 2.0], f"query {i}") for i in range(20)], 2)
    monkeypatch.setattr(type(groups), "_lines", lambda *_: pytest.fail("a line is read again"))
    groups.scored()
