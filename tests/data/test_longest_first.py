"""The one reader of texts gives every place once, the longest of a stretch first, in batches of a size or of a budget."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from lead_ds.data.tokens.encoder import Tokens
from lead_ds.data.tokens.longest_first import SHORTER, Untokenised, longest_first
from lead_ds.io.shards import turns, unfinished

TEXTS = ["x" * (i * 7 % 23 + 1) for i in range(50)]


def tokenize(texts: list[str]) -> Tokens:
    return {"input_ids": torch.tensor([len(text) for text in texts])}


@pytest.mark.parametrize("stretch", [None, 8, 21])
@pytest.mark.parametrize("budget", [None, 40])
def test_every_place_once_the_longest_of_a_stretch_first(stretch: int | None, budget: int | None) -> None:
    loaded = []

    def load(places: range) -> Untokenised[str]:
        loaded.append(places)
        return Untokenised(TEXTS[places.start : places.stop], tokenize)

    batches = list(longest_first(len(TEXTS), load, batch_size=4, stretch=stretch, budget=budget))
    places = [place for some, _ in batches for place in some]
    assert sorted(places) == list(range(50))
    assert [len(TEXTS[place]) for place in places] == [n for _, tokens in batches for n in tokens["input_ids"].tolist()]
    for some in loaded:
        lengths = [len(TEXTS[place]) for place in places if place in some]
        assert lengths == sorted(lengths, reverse=True)
    for some, tokens in batches:
        longest = int(tokens["input_ids"].max())
        most = 4 if budget is None else min(max(budget // longest, 1), 4 * SHORTER)
        assert 0 < len(some) <= most


def test_nothing_and_what_goes_wrong() -> None:
    def broken(texts: list[str]) -> Tokens:
        raise ValueError("the tokenizer")

    assert list(longest_first(0, lambda _: Untokenised([], tokenize), batch_size=4)) == []
    before = threading.active_count()
    with pytest.raises(ValueError, match="the tokenizer"):
        list(longest_first(3, lambda places: Untokenised(TEXTS[:3], broken), batch_size=2))
    assert threading.active_count() == before


def test_turns_and_what_is_unfinished(tmp_path: Path) -> None:
    shares = [turns([0, 2, 3, 5, 8], rank, 3) for rank in range(3)]
    assert shares == [[0, 5], [2, 8], [3, None]]
    paths = [tmp_path / str(i) for i in range(4)]
    for path in (paths[0], paths[2]):
        path.write_text("")
    told: list[str] = []
    assert unfinished(paths, lambda path: "spoilt" if path.name == "2" else None, told.append) == [1, 2, 3]
    assert told == ["2 is damaged (spoilt): it is made again"]
