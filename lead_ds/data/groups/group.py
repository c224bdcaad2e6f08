"""Training groups: a query, one of its positives and its negatives, drawn again each epoch.

Three stores behind one interface: groups of ids (`by_id`), and groups that list their texts, in a file (`by_text`) or in
memory (`rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from lead_ds.errors import InputError
from lead_ds.io.notes import say_once

G = TypeVar("G")


@dataclass
class Group:
    """One drawn group of N passages, the positive first."""

    query_id: str
    query: str
    passage_ids: list[str]
    passages: list[str]
    keys: np.ndarray  # int64 [N]; equal keys are the same passage
    positive_keys: np.ndarray  # int64; every known positive of the query
    query_key: int = -1  # groups of ids: the query's row; -1: its tokens are kept nowhere
    scores: np.ndarray | None = None  # float32 [N] teacher scores, NaN where absent
    role: Literal["query", "passage"] | None = None  # of a text alone: how its one "passage" is read


@dataclass
class Pool:
    """Every passage that a group's own lines offer to a draw: its positives, and its negatives that are no known positive."""

    query: str
    keys: np.ndarray  # int64 [n], distinct
    passages: list[str]
    role: Literal["query", "passage"] | None = None  # see Group


class Groups(Protocol):
    """Training groups, addressed by row. Picklable."""

    path: Path
    alone: bool  # they are texts alone: of one passage and no query each
    has_scores: bool
    identical: int  # groups for which a passage is left out of the negatives, since it is the query itself
    short: int  # groups that list fewer usable negatives than a draw takes: random passages fill it; 0: none lists any
    sources: dict[str, Path]  # the files whose content decides the groups: train, and corpus and queries if any
    checksums: dict[str, str]  # of what decides them and is in no file

    def __len__(self) -> int: ...

    def draw(self, row: int, seed: int, epoch: int, progress: float | None = None) -> Group:
        """The group of a row; its positive and negatives depend on the arguments and nothing else.

        progress: of a schedule, from 0 to 1; the groups are then `scored`.
        """
        ...

    def pool(self, row: int) -> Pool:
        """What a draw of the row chooses from before it takes random passages."""
        ...

    def listed(self, row: int) -> tuple[int, np.ndarray]:
        """The query, equal where two rows ask the same, and the keys of the pool."""
        ...

    def offered(self, row: int) -> int:
        """How many negatives the row's pool has."""
        ...

    def where(self, row: int) -> str:
        """The file and line of a row, for errors."""
        ...

    def scored(self) -> Groups:
        """The same groups, of which passages without a score are never drawn, nor random ones.

        Raises InputError naming the file, and the line of a group with no scored positive or too few scored negatives.
        """
        ...


def refuse_unscored(groups: Groups, row: int, positives: int, negatives: int, wanted: int) -> None:
    """Raise InputError for a row that has too few passages with scores to be drawn."""
    if positives and negatives >= wanted:
        return
    what = f"{negatives} negatives have a score, {wanted} are drawn" if positives else "no positive has a score"
    remedy = "add scores, take the line out" + (", or lower data.negatives" if positives else "")
    raise InputError(groups.where(row), what, remedy)


def short_of(own: np.ndarray, wanted: int) -> int:
    """See `Groups.short`; own [n]: each group's own negatives that are no positives of it, -1 where no group lists any."""
    return int(((own >= 0) & (own < wanted)).sum())


def say_identical(groups: Groups) -> None:
    """Say once of how many groups a passage that is the query itself is left out."""
    if groups.identical:
        what = f"{groups.identical} of {len(groups)} groups: a passage that is the query itself is not a negative of it"
        say_once(f"{groups.path.name}: {what} (data.keep_identical=true keeps it)")


def twin_of(groups: G) -> G:
    """A shallow copy, which reads nothing: `copy` would open the files again, as a worker process does."""
    twin = object.__new__(type(groups))
    twin.__dict__.update(groups.__dict__)
    return twin


def no_scores(groups: Groups) -> InputError:
    """What to raise for groups of which none has a score."""
    return InputError(groups.path, "holds no scores", "name the model with teacher.kind and teacher.path instead")


class KnownPositives:
    """All positives of a query, also those of other lines of the file that ask the same; and passages that are the query."""

    def __init__(
        self, queries: np.ndarray, starts: np.ndarray, keys: np.ndarray, same: dict[int, np.ndarray] | None = None
    ) -> None:
        """`queries` [n]: equal where two rows ask the same; row i's positives are keys[starts[i]:starts[i+1]].

        same: row -> passages that are the query itself, which are no more its negatives than its positives are.
        """
        self._same = same or {}
        self._starts, self._keys, self._queries = starts, keys, queries
        order = np.argsort(queries, kind="stable")
        ordered = np.asarray(queries)[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        self._order: np.ndarray | None = order if len(repeated) else None
        self._ordered: np.ndarray | None = ordered if len(repeated) else None

    def of(self, row: int) -> np.ndarray:
        """Keys of the known positives of the query of `row`, without repetition. int64."""
        if self._order is None:
            return np.unique(self._own(row)).astype(np.int64)
        assert self._ordered is not None
        query = self._queries[row]
        first, last = np.searchsorted(self._ordered, query, "left"), np.searchsorted(self._ordered, query, "right")
        return np.unique(np.concatenate([self._own(int(other)) for other in self._order[first:last]])).astype(np.int64)

    def asked_again(self) -> np.ndarray:
        """Of each row, whether another row asks the same. bool [n]."""
        again = np.zeros(len(self._queries), bool)
        if self._order is not None and self._ordered is not None:
            same = self._ordered[1:] == self._ordered[:-1]
            again[self._order[1:][same]] = again[self._order[:-1][same]] = True
        return again

    def leave(self, passages: int, wanted: int) -> bool:
        """Whether every query has `wanted` of `passages` that are not its known positives."""
        counts = np.diff(self._starts)
        for row in self._same:
            counts[row] = len(np.unique(self._own(row)))
        if self._order is None or self._ordered is None:
            return passages - int(counts.max(initial=0)) >= wanted
        firsts = np.flatnonzero(np.concatenate([[True], self._ordered[1:] != self._ordered[:-1]]))
        bounds = np.add.reduceat(counts[self._order], firsts)  # too high where lines repeat a positive
        doubtful = self._order[firsts[passages - bounds < wanted]]
        return all(passages - len(self.of(int(row))) >= wanted for row in doubtful)

    def _own(self, row: int) -> np.ndarray:
        own = self._keys[int(self._starts[row]) : int(self._starts[row + 1])]
        return np.concatenate([own, self._same[row]]) if row in self._same else own
