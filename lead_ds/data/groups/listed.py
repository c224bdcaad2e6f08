"""Groups whose records carry their texts: how they are drawn, wherever their records lie.

Passages are distinguished by a hash of their text, or of their docid where they have one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from lead_ds.data.groups.drawing import Draw
from lead_ds.data.groups.formats import Lines, Listed, Reader, Record, Unusable, is_query, key_of
from lead_ds.data.groups.group import Group, KnownPositives, Pool, no_scores, refuse_unscored, short_of, twin_of
from lead_ds.data.groups.schedule import easy_to_hard
from lead_ds.errors import InputError
from lead_ds.io.mapped import Arrays

TRIES = 100_000  # random passages drawn for one group


class ListedGroups(ABC):
    """Groups that list their passages' texts. `arrays` are those of `index_records`; `wanted`: negatives of a draw.

    keep_identical: a passage that is the query itself, by its id or its text, may be its negative.
    """

    alone = False
    sources: dict[str, Path]
    checksums: dict[str, str]

    def __init__(self, path: Path, arrays: Arrays, wanted: int, keep_identical: bool = False) -> None:
        self.path, self._starts, self._wanted = path, arrays["starts"], wanted
        self.has_scores = bool(arrays["has_scores"][0])
        self.identical = 0 if keep_identical else int(arrays["identical"][0])
        self._keep_identical = keep_identical
        self.short = short_of(arrays["own"], wanted)
        self._known = KnownPositives(arrays["query"], arrays["positive_starts"], arrays["positives"])
        self._scores_listed, self._scored = arrays["scored"].reshape(-1, 2), False

    @abstractmethod
    def where(self, row: int) -> str:
        """See `Groups.where`."""

    @abstractmethod
    def _lines(self, row: int) -> Lines:
        """What the records of a row's group hold."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    def draw(self, row: int, seed: int, epoch: int, progress: float | None = None) -> Group:
        """See `Groups.draw`. Negatives come from the row, then from other rows at random; none is a positive."""
        draw = Draw(seed, epoch, row)
        lines = self._drawable(row)
        known = self._known_of(lines, row)
        passages = [lines.positives[draw.below(len(lines.positives))]]
        keys = [passages[0].key]
        taken = set(known.tolist())
        order = draw.shuffled(len(lines.negatives))
        if progress is not None:
            scores_N = np.array([passage.score for passage in lines.negatives], np.float32)
            order = easy_to_hard(draw, scores_N, self._wanted, progress)
        while len(passages) <= self._wanted and (i := next(order, None)) is not None:
            self._add(lines, lines.negatives[i], passages, keys, taken)
        tries = 0
        while len(passages) <= self._wanted:
            tries += 1
            if tries > TRIES:  # all that is left are copies of the query, which the check at opening cannot count
                what = f"no {self._wanted} negatives were found for query {lines.query[:60]!r}"
                raise InputError(self.path, what, "lower data.negatives")
            other = self._lines(draw.below(len(self)))
            pool = [*other.positives, *other.negatives]
            picked = pool[draw.below(len(pool))]
            # The score that the other row gives is for its own query.
            self._add(lines, Listed(picked.text, picked.name), passages, keys, taken)
        return Group(
            query_id=lines.name if lines.name is not None else f"{key_of(lines.query):016x}",
            query=lines.query,
            passage_ids=[
                passage.name if passage.name is not None else f"{key:016x}"
                for passage, key in zip(passages, keys, strict=True)
            ],
            passages=[passage.text for passage in passages],
            keys=np.array(keys, np.int64),
            positive_keys=known,
            scores=np.array([passage.score for passage in passages], np.float32) if self.has_scores else None,
        )

    def pool(self, row: int) -> Pool:
        lines = self._drawable(row)
        passages = {passage.key: passage.text for passage in lines.positives} | self._offered(lines, row)
        return Pool(lines.query, np.array(list(passages), np.int64), list(passages.values()))

    def listed(self, row: int) -> tuple[int, np.ndarray]:
        pool = self.pool(row)
        return key_of(pool.query), pool.keys

    def offered(self, row: int) -> int:
        return len(self._offered(self._drawable(row), row))

    def scored(self) -> ListedGroups:
        """See `Groups.scored`. Reads those rows alone whose negatives may also be positives of another row."""
        if not self.has_scores:
            raise no_scores(self)
        groups = twin_of(self)
        groups._scored = True
        wanted, doubtful = self._wanted, self._known.asked_again()
        for row, (positives, negatives) in enumerate(self._scores_listed.tolist()):
            if negatives < wanted or doubtful[row]:
                negatives = groups.offered(row)
            refuse_unscored(groups, row, positives, negatives, wanted)
        return groups

    def _drawable(self, row: int) -> Lines:
        lines = self._lines(row)
        return lines.scored() if self._scored else lines

    def _offered(self, lines: Lines, row: int) -> dict[int, str]:
        known = set(self._known_of(lines, row).tolist())
        offered = {passage.key: passage for passage in lines.negatives if passage.key not in known}
        return {key: passage.text for key, passage in offered.items() if not self._is_query(lines, passage)}

    def _known_of(self, lines: Lines, row: int) -> np.ndarray:
        """Keys of passages that are no negatives of the query: its known positives, and what has its id or is its text."""
        known = self._known.of(row)
        if not self.identical:
            return known
        return np.union1d(known, [key_of(name) for name in (lines.name, lines.query) if name is not None])

    def _is_query(self, lines: Lines, passage: Listed) -> bool:
        return not self._keep_identical and is_query(lines, passage)

    def _add(self, lines: Lines, passage: Listed, passages: list[Listed], keys: list[int], taken: set[int]) -> None:
        key = passage.key
        if key not in taken and not self._is_query(lines, passage):
            taken.add(key)
            passages.append(passage)
            keys.append(key)

    def refuse_small_pool(self) -> None:
        """Other rows lend negatives; reads only as many rows as it takes to see that there are enough."""
        pool: set[int] = set()
        wanted = self._wanted + bool(self.identical)  # a row may find itself among them
        for row in range(len(self)):
            lines = self._lines(row)
            pool.update(passage.key for passage in (*lines.positives, *lines.negatives))
            seen = row + 1
            if (seen & (seen - 1) == 0 or seen == len(self)) and self._known.leave(len(pool), wanted):
                return
        raise InputError(
            self.path,
            f"{len(pool)} different passages are too few for {self._wanted} negatives of every query",
            "lower data.negatives",
        )


def index_records(
    records: Iterable[tuple[int, int, Record]], end: int, read: Reader, where: Callable[[int], str]
) -> Arrays:
    """Check every record, and note where groups start and what their positives are.

    records: (where it starts, its number, the record); end: where the last one ends. Raises InputError at `where(number)`.
    """
    starts: list[int] = []
    queries: list[int] = []
    positives: list[int] = []
    positive_starts = [0]
    identical: list[bool] = []
    scored: list[list[int]] = []  # positives, and different negatives, that have a score
    own: list[int] = []  # different negatives
    negatives: set[int] = set()
    offered: set[int] = set()
    listing = has_scores = False
    opened = (0, "")  # number and query of the group at hand
    for start, number, record in records:
        try:
            lines = read.checked(record)
        except Unusable as error:
            raise InputError(where(number), error.what, error.remedy) from None
        if not (read.grouped and starts and lines.query == opened[1]):
            _refuse_without_positive(positive_starts, positives, opened, where)
            starts.append(start)
            identical.append(False)
            scored.append([0, 0])
            own.append(0)
            negatives, offered = set(), set()
            queries.append(key_of(lines.query if lines.name is None else lines.name))
            positive_starts.append(len(positives))
            opened = (number, lines.query)
        positives += [passage.key for passage in lines.positives]
        positive_starts[-1] = len(positives)
        identical[-1] |= any(is_query(lines, passage) for passage in lines.negatives)
        having = lines.scored()
        has_scores = has_scores or bool(having.positives or having.negatives)
        negatives.update(passage.key for passage in having.negatives if not is_query(lines, passage))
        listing = listing or bool(lines.negatives)
        offered.update(passage.key for passage in lines.negatives if not is_query(lines, passage))
        own[-1] = len(offered.difference(positives[positive_starts[-2] :]))
        scored[-1][0] += len(having.positives)
        scored[-1][1] = len(negatives.difference(positives[positive_starts[-2] :]))
    _refuse_without_positive(positive_starts, positives, opened, where)
    return {
        "starts": np.array([*starts, end], np.int64),
        "query": np.array(queries, np.int64),
        "positives": np.array(positives, np.int64),
        "positive_starts": np.array(positive_starts, np.int64),
        "own": np.array(own if listing else [-1] * len(own), np.int32),
        "has_scores": np.array([has_scores]),
        "scored": np.array(scored, np.int32).reshape(-1),
        # As a negative of its own row, or as a passage of another, which a batch compares it with.
        "identical": np.array([int((np.isin(queries, positives) | np.array(identical, bool)).sum())]),
    }


def _refuse_without_positive(
    starts: list[int], positives: list[int], opened: tuple[int, str], where: Callable[[int], str]
) -> None:
    if len(starts) > 1 and starts[-2] == len(positives):
        number, query = opened
        raise InputError(
            where(number),
            f"query {query[:60]!r} has no positive",
            "give it one, beside its other lines, or take it out",
        )
