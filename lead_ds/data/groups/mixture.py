"""Several sets of groups as one: which set each group of a step comes from, and which of its groups that is.

A set's share is weight * size^alpha. Shares are spread over cycles of some thousand draws, each cycle in an order of its
own. So the n-th draw of a run, its set and how many of the set's were drawn before follow from n alone. A run resumes
where it was, and ranks need not ask each other. Each set is gone through again and again, every time in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from lead_ds.data.groups.group import Group, Groups, Pool
from lead_ds.data.groups.shuffle import shuffled
from lead_ds.errors import InputError
from lead_ds.io.facts import digest
from lead_ds.settings.data import DataSet

T = TypeVar("T", Group, Pool)

CYCLE = 4096  # draws over which the shares are exact, to one draw
_SHIFT = 56  # the bits above this one hold the set's number, so that keys of different sets never collide


class Drawn(NamedTuple):
    """One draw: a row of the mixture, and how often its set was gone through before."""

    row: int
    epoch: int


class MixedGroups:
    """The groups of several sets. Rows are those of the first, then of the next. Picklable."""

    def __init__(self, sets: Sequence[DataSet], groups: Sequence[Groups], *, alpha: float, apart: bool) -> None:
        self._sets, self._groups, self._alpha, self._apart = sets, groups, alpha, apart
        sizes = [len(one) for one in groups]
        self._ends = np.cumsum(sizes)
        self._sampling = Sampling(sizes, [one.weight for one in sets], alpha)
        self.path, self.alone = groups[0].path, groups[0].alone
        self.has_scores = all(one.has_scores for one in groups)
        self.identical = sum(one.identical for one in groups)
        self.short = sum(one.short for one in groups)
        named = list(zip(sets, groups, strict=True))
        self.sources = {f"{of.label}: {name}": path for of, one in named for name, path in one.sources.items()}
        self.checksums = {
            f"{of.label}: {name}": checksum for of, one in named for name, checksum in one.checksums.items()
        }
        self.checksums["sets"] = digest([[of.label, of.prompts] for of in sets])  # rows and texts depend on them
        if len({one.alone for one in groups}) > 1:
            what = "some sets hold groups, some hold texts alone, and a loss reads one or the other"
            raise InputError("data.sets", what, "mix sets of one sort")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def drawn(self, slots: Sequence[int], seed: int, together: int) -> list[Drawn]:
        """What the draws of these numbers are. together: so many one after another are of one set, if sets are apart."""
        found = []
        unit = together if self._apart else 1
        for slot in slots:
            at, taken = self._sampling.of(slot // unit, seed)
            size = len(self._groups[at])
            epoch, place = divmod(taken * unit + slot % unit, size)
            first = int(self._ends[at]) - size
            found.append(Drawn(first + shuffled(place, size, seed, epoch, at), epoch))
        return found

    def draw(self, row: int, seed: int, epoch: int, progress: float | None = None) -> Group:
        """See `Groups.draw`: with the prompts of its set."""
        at, place = self.set_of(row)
        group = self._groups[at].draw(place, seed, epoch, progress)
        return replace(
            self._prompted(at, group),
            keys=group.keys ^ (at << _SHIFT),
            positive_keys=group.positive_keys ^ (at << _SHIFT),
            query_key=-1,  # of its set, and without the prompt
        )

    def pool(self, row: int) -> Pool:
        at, place = self.set_of(row)
        pool = self._groups[at].pool(place)
        return replace(self._prompted(at, pool), keys=pool.keys ^ (at << _SHIFT))

    def listed(self, row: int) -> tuple[int, np.ndarray]:
        at, place = self.set_of(row)
        query, keys = self._groups[at].listed(place)
        return query ^ (at << _SHIFT), keys ^ (at << _SHIFT)

    def offered(self, row: int) -> int:
        at, place = self.set_of(row)
        return self._groups[at].offered(place)

    def where(self, row: int) -> str:
        at, place = self.set_of(row)
        return self._groups[at].where(place)

    def scored(self) -> MixedGroups:
        groups = [one.scored() for one in self._groups]
        return MixedGroups(self._sets, groups, alpha=self._alpha, apart=self._apart)

    def epochs(self, draws: int, seed: int, together: int) -> list[int]:
        """How often each set is begun in a run's first `draws` draws; once at least. together: see `drawn`."""
        unit = together if self._apart else 1
        taken = self._sampling.taken(-(-draws // unit), seed)
        sizes = np.diff(self._ends, prepend=0).tolist()
        return [max(1, -(-count * unit // size)) for count, size in zip(taken, sizes, strict=True)]

    def set_of(self, row: int) -> tuple[int, int]:
        """The number of a row's set, and the row in that."""
        at = int(np.searchsorted(self._ends, row, "right"))
        return at, row - (int(self._ends[at - 1]) if at else 0)

    def _prompted(self, at: int, texts: T) -> T:
        """The texts of a set's group or pool behind its prompts."""
        prompts = self._sets[at].prompts
        query, passage = prompts.get("query", ""), prompts.get("passage", "")
        before = query if texts.role == "query" else passage
        return replace(texts, query=query + texts.query, passages=[before + text for text in texts.passages])


class Sampling:
    """Which set a draw is of. Every set is drawn from at least once in a cycle.

    >>> sampling = Sampling([100, 300], [1.0, 1.0], alpha=1.0)
    >>> [sampling.of(n, seed=0)[0] for n in range(sampling.cycle)].count(1)
    3072
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], alpha: float) -> None:
        shares = np.array(weights) * np.array(sizes, float) ** alpha
        self.counts = np.maximum(1, np.round(shares / shares.sum() * CYCLE)).astype(np.int64)
        self.cycle = int(self.counts.sum())

    def of(self, draw: int, seed: int) -> tuple[int, int]:
        """The set of a draw, and how many draws of that set there were before."""
        cycle, place = divmod(draw, self.cycle)
        sets, before = _order(tuple(self.counts.tolist()), seed, cycle)
        at = int(sets[place])
        return at, cycle * int(self.counts[at]) + int(before[place])

    def taken(self, draws: int, seed: int) -> list[int]:
        """Of each set, how many of the first `draws` draws are of it."""
        cycles, rest = divmod(draws, self.cycle)
        sets, _ = _order(tuple(self.counts.tolist()), seed, cycles)
        return (cycles * self.counts + np.bincount(sets[:rest], minlength=len(self.counts))).tolist()  # type: ignore[no-any-return]


@lru_cache(maxsize=4)
def _order(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The sets of a cycle's draws, and how many draws of its set stand before each."""
    sets = np.repeat(np.arange(len(counts)), counts)
    sets = np.random.Generator(np.random.PCG64([seed, cycle, len(counts)])).permutation(sets)
    before = np.zeros(len(sets), np.int64)
    for at, count in enumerate(counts):
        before[sets == at] = np.arange(count)
    return sets, before
