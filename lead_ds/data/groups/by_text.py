"""Groups whose lines carry their texts, whatever their format (`formats`).

Opening parses the file once, checks every line and keeps, per group, its byte span and the keys of its positives; a draw
reads its own lines again. Passages are told apart by a hash of their text, or of their docid where they have one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lead_ds.data.groups.drawing import Draw
from lead_ds.data.groups.formats import Lines, Listed, Reader, Record, Unusable, key_of, reader_of
from lead_ds.data.groups.group import Group, KnownPositives, Pool
from lead_ds.errors import InputError
from lead_ds.io.jsonl import Block, Buffer, loads, read_blocks
from lead_ds.io.mapped import Arrays, cached_arrays, open_buffer, signature

if TYPE_CHECKING:
    from lead_ds.settings.data import DataConfig


class TextGroups:
    """Groups of a file that holds their texts."""

    def __init__(self, config: DataConfig, path: Path, form: str, read: Reader, buffer: Buffer, arrays: Arrays) -> None:
        self.path, self._form, self._config, self._read, self._buffer = path, form, config, read, buffer
        self._starts = arrays["starts"]
        self.sources = {"train": path}
        self.has_scores = bool(arrays["has_scores"][0])
        self._known = KnownPositives(arrays["query"], arrays["positive_starts"], arrays["positives"])
        self._refuse_small_pool()

    @classmethod
    def open(cls, config: DataConfig, path: Path, form: str) -> TextGroups:
        """Open groups in format `form`. Raises InputError naming file and line for a record that is no group."""
        buffer = open_buffer(path)
        first = next(read_blocks(path, buffer), None)
        if first is None:
            raise InputError(path, "holds no groups", "one JSON object a line")
        try:
            read = reader_of(form, first.records[0])
        except Unusable as error:
            first.fail(0, error.what, error.remedy)
        key = {"version": 1, "form": form, **signature(path)}
        arrays = cached_arrays(path, form, key, lambda: _build(path, buffer, read))
        return cls(config, path, form, read, buffer, arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self._config, self.path, self._form)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def draw(self, row: int, seed: int, epoch: int) -> Group:
        """See `Groups.draw`. Negatives come from the line, then from other lines at random; none is a positive."""
        draw, wanted = Draw(seed, epoch, row), self._config.negatives
        lines = self._lines(row)
        known = self._known.of(row)
        passages = [lines.positives[draw.below(len(lines.positives))]]
        keys = [passages[0].key]
        taken = set(known.tolist())
        order = draw.shuffled(len(lines.negatives))
        while len(passages) <= wanted and (i := next(order, None)) is not None:
            self._add(lines.negatives[i], passages, keys, taken)
        while len(passages) <= wanted:
            other = self._lines(draw.below(len(self)))
            pool = [*other.positives, *other.negatives]
            picked = pool[draw.below(len(pool))]
            # The score that the other line gives is for its own query.
            self._add(Listed(picked.text, picked.name), passages, keys, taken)
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
        """See `Groups.pool`."""
        lines = self._lines(row)
        passages = {passage.key: passage.text for passage in lines.positives} | self._offered(lines, row)
        return Pool(lines.query, np.array(list(passages), np.int64), list(passages.values()))

    def listed(self, row: int) -> tuple[int, np.ndarray]:
        """See `Groups.listed`."""
        pool = self.pool(row)
        return key_of(pool.query), pool.keys

    def offered(self, row: int) -> int:
        """See `Groups.offered`."""
        return len(self._offered(self._lines(row), row))

    def _offered(self, lines: Lines, row: int) -> dict[int, str]:
        known = set(self._known.of(row).tolist())
        return {passage.key: passage.text for passage in lines.negatives if passage.key not in known}

    @staticmethod
    def _add(passage: Listed, passages: list[Listed], keys: list[int], taken: set[int]) -> None:
        key = passage.key
        if key not in taken:
            taken.add(key)
            passages.append(passage)
            keys.append(key)

    def _lines(self, row: int) -> Lines:
        span = self._buffer[int(self._starts[row]) : int(self._starts[row + 1])]
        if self._read.grouped:
            return self._read.join([loads(line) for line in span.split(b"\n") if line.strip()])
        return self._read.one(loads(span))

    def _refuse_small_pool(self) -> None:
        """Other lines lend negatives; reads only as many lines as it takes to see that there are enough."""
        pool: set[int] = set()
        for row in range(len(self)):
            lines = self._lines(row)
            pool.update(passage.key for passage in (*lines.positives, *lines.negatives))
            seen = row + 1
            if (seen & (seen - 1) == 0 or seen == len(self)) and self._known.leave(len(pool), self._config.negatives):
                return
        raise InputError(
            self.path,
            f"{len(pool)} different passages are too few for {self._config.negatives} negatives of every query",
            "lower data.negatives",
        )


def _build(path: Path, buffer: Buffer, read: Reader) -> Arrays:
    starts: list[int] = []
    queries: list[int] = []
    positives: list[int] = []
    positive_starts = [0]
    scored = False
    previous: str | None = None
    opened = (path, 1, "")
    for block in read_blocks(path, buffer):
        for row, record in enumerate(block.records):
            lines = _one(block, row, record, read)
            if not (read.grouped and lines.query == previous):
                _refuse_without_positive(positive_starts, positives, opened)
                starts.append(int(block.starts[row]))
                queries.append(key_of(lines.query if lines.name is None else lines.name))
                positive_starts.append(len(positives))
                opened, previous = (path, block.numbers[row], lines.query), lines.query
            positives += [passage.key for passage in lines.positives]
            positive_starts[-1] = len(positives)
            scored = scored or any(p.score == p.score for p in (*lines.positives, *lines.negatives))  # NaN: none
    _refuse_without_positive(positive_starts, positives, opened)
    return {
        "starts": np.array([*starts, len(buffer)], np.int64),
        "query": np.array(queries, np.int64),
        "positives": np.array(positives, np.int64),
        "positive_starts": np.array(positive_starts, np.int64),
        "has_scores": np.array([scored]),
    }


def _one(block: Block, row: int, record: Record, read: Reader) -> Lines:
    try:
        return read.one(record)
    except Unusable as error:
        block.fail(row, error.what, error.remedy)


def _refuse_without_positive(starts: list[int], positives: list[int], opened: tuple[Path, int, str]) -> None:
    if len(starts) > 1 and starts[-2] == len(positives):
        path, number, query = opened
        raise InputError(
            f"{path}:{number}",
            f"query {query[:60]!r} has no positive",
            "give it one, beside its other lines, or take it out",
        )
