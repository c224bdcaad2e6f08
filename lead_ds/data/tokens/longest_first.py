"""The one reader of many texts or pairs: batches of about equal length, the longest first, made ready while the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from lead_ds.data.tokens.encoder import Rows, TextEncoder, Tokens
from lead_ds.io.prefetch import ahead

T = TypeVar("T")

AHEAD = 4  # batches made ready ahead of the model
SHORTER = 8  # a batch of short texts holds at most so many times more than one of full length


class Loaded(Protocol):
    """Items that are at hand, to be put into batches."""

    @property
    def lengths(self) -> Sequence[int]:
        """By which they are sorted."""
        ...

    def tokens(self, chosen: Sequence[int]) -> Tokens:
        """A batch of some of them."""
        ...


@dataclass(frozen=True)
class Untokenised(Generic[T]):
    """Texts, or pairs of texts: sorted by their characters, tokenised batch by batch."""

    items: Sequence[T]
    tokenize: Callable[[list[T]], Tokens]

    @property
    def lengths(self) -> list[int]:
        """Characters."""
        return [_characters(item) for item in self.items]

    def tokens(self, chosen: Sequence[int]) -> Tokens:
        return self.tokenize([self.items[i] for i in chosen])


@dataclass(frozen=True)
class Tokenised:
    """Texts tokenised all at once: sorted by their tokens, padded batch by batch."""

    encoder: TextEncoder
    rows: Rows
    types: Rows | None
    side: Literal["queries", "passages"] = "passages"

    @property
    def lengths(self) -> list[int]:
        """Tokens."""
        return [len(row) for row in self.rows]

    def tokens(self, chosen: Sequence[int]) -> Tokens:
        types = None if self.types is None else [self.types[i] for i in chosen]
        read = self.encoder.query_tokens if self.side == "queries" else self.encoder.passage_tokens
        return read([self.rows[i] for i in chosen], types)


def longest_first(
    count: int,
    load: Callable[[range], Loaded],
    *,
    batch_size: int,
    stretch: int | None = None,
    budget: int | None = None,
) -> Iterator[tuple[list[int], Tokens]]:
    """(places below `count`, their tokens), batch after batch.

    load: some consecutive places -> what is there, called a stretch ahead. stretch: how many are sorted together (None: all);
    more is less padding and more memory. budget: the tokens of a batch, padding counted, so that batches of short texts
    hold more than `batch_size` (SHORTER times as many at most). None: `batch_size` each.
    """
    size = stretch or max(count, 1)
    stretches = (range(start, min(start + size, count)) for start in range(0, count, size))
    with ThreadPoolExecutor(1) as loading, ThreadPoolExecutor(1) as batching:
        for places, loaded in ahead(loading, lambda some: (some, load(some)), stretches, 1):
            lengths = loaded.lengths
            order = sorted(range(len(places)), key=lambda i: -lengths[i])
            made = ahead(batching, _made_of(loaded), _cut(order, lengths, batch_size, budget), AHEAD)
            for chosen, tokens in made:
                yield [places[i] for i in chosen], tokens


def once(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Each different text, in the order in which they come, and the place of every text among them, int64.

    >>> once(["b", "a", "b"])
    (['b', 'a'], array([0, 1, 0]))
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), np.array([places[text] for text in texts], np.int64)


def _made_of(loaded: Loaded) -> Callable[[list[int]], tuple[list[int], Tokens]]:
    return lambda chosen: (chosen, loaded.tokens(chosen))


def _cut(order: list[int], lengths: Sequence[int], batch_size: int, budget: int | None) -> Iterator[list[int]]:
    """`order`, whose lengths fall, in batches of at most `budget` tokens with padding; None: of `batch_size` texts each."""
    start = 0
    while start < len(order):
        size = batch_size
        if budget is not None:
            size = min(max(budget // max(lengths[order[start]], 1), 1), batch_size * SHORTER)
        yield order[start : start + size]
        start += size


def _characters(item: Any) -> int:
    return len(item) if isinstance(item, str) else sum(len(part) for part in item if isinstance(part, str))
