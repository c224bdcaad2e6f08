"""Groups from memory: rows of texts, a list or a `datasets.Dataset`, in any format whose records carry their texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from lead_ds.data.groups.formats import FORMATS, Lines, Reader, Record, Unusable, form_of, reader_of
from lead_ds.data.groups.listed import ListedGroups, index_records
from lead_ds.errors import InputError
from lead_ds.io.mapped import Arrays

NAME = "data"  # what errors call the rows


class Rows(Protocol):
    """Records by number: a list of dictionaries, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Record: ...


class RowGroups(ListedGroups):
    """Groups of rows in memory. Picklable; `checksums` distinguishes two sets of rows.

    >>> rows = [
    ...     {"query": "what barks", "positives": ["a dog"], "negatives": ["a cat", "a cow"]},
    ...     {"query": "what moos", "positives": ["a cow"], "negatives": ["a cat"]},
    ... ]
    >>> groups = RowGroups.of(rows, negatives=2)
    >>> len(groups)
    2
    >>> group = groups.draw(1, seed=0, epoch=0)
    >>> group.query, group.passages  # the second negative is lent by the other row
    ('what moos', ['a cow', 'a cat', 'a dog'])
    """

    def __init__(self, rows: Rows, read: Reader, arrays: Arrays, checksum: str, negatives: int) -> None:
        super().__init__(Path(NAME), arrays, negatives)
        self._rows, self._read = rows, read
        self.sources, self.checksums = {}, {"rows": checksum}
        self.refuse_small_pool()

    @classmethod
    def of(cls, rows: Rows, negatives: int) -> RowGroups:
        """Groups of `rows`, each with `negatives` negatives in a draw.

        Rows are {"query", "positives": [text], "negatives": [text], "scores"?: one number for each of them, positives
        first}; or have the columns of sentence-transformers, FlagEmbedding or Tevatron. Raises InputError naming the row
        that is not a group, and where there are too few passages to draw negatives from.
        """
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, str | bytes | dict):
            what = f"a {type(rows).__name__} is not a list of rows"
            raise InputError(NAME, what, "give a list of dictionaries, a datasets.Dataset, or the path of a folder")
        if len(rows) == 0:
            raise InputError(NAME, "holds no groups", f"each row is {FORMATS['texts']}")
        digest = hashlib.blake2b(digest_size=16)

        def records() -> Iterator[tuple[int, int, Record]]:
            for number in range(len(rows)):
                record = _record(rows, number)
                # The order of columns may decide which of them is the query.
                digest.update(json.dumps(record, default=str).encode() + b"\n")
                yield number, number, record

        first = _record(rows, 0)
        form = form_of(first)
        if form is None:
            names = ", ".join(map(repr, first)) or "of an empty row"
            raise InputError(f"{NAME}[0]", f"no known format of groups has the fields {names}", FORMATS["texts"])
        try:
            read = reader_of(form, first)
        except Unusable as error:
            raise InputError(f"{NAME}[0]", error.what, error.remedy) from None
        arrays = index_records(records(), len(rows), read, lambda number: f"{NAME}[{number}]")
        return cls(rows, read, arrays, digest.hexdigest(), negatives)

    def where(self, row: int) -> str:
        return f"{NAME}[{int(self._starts[row])}]"

    def _lines(self, row: int) -> Lines:
        first, last = int(self._starts[row]), int(self._starts[row + 1])
        if not self._read.grouped:
            return self._read.one(self._rows[first])
        return self._read.join([self._rows[number] for number in range(first, last)])


def _record(rows: Rows | Sequence[object], number: int) -> Record:
    record = rows[number]
    if not isinstance(record, dict):
        what = f"is a {type(record).__name__}, not a dictionary"
        raise InputError(f"{NAME}[{number}]", what, f"each row is {FORMATS['texts']}")
    return record
