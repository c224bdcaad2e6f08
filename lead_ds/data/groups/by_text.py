"""Groups of a file whose lines carry their texts, whatever their format (`formats`).

Opening parses the file once, checks every line and keeps, per group, its byte span and the keys of its positives; a draw
reads its own lines again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lead_ds.data.groups.formats import Lines, Reader, Record, Unusable, reader_of
from lead_ds.data.groups.listed import ListedGroups, index_records
from lead_ds.errors import InputError
from lead_ds.io.jsonl import Buffer, loads, read_blocks
from lead_ds.io.mapped import Arrays, cached_arrays, open_buffer, signature

if TYPE_CHECKING:
    from lead_ds.settings.data import DataConfig


class TextGroups(ListedGroups):
    """Groups of a file that holds their texts."""

    def __init__(self, config: DataConfig, path: Path, form: str, read: Reader, buffer: Buffer, arrays: Arrays) -> None:
        super().__init__(path, arrays, config.negatives, config.keep_identical)
        self._form, self._config, self._read, self._buffer = form, config, read, buffer
        self.sources = {"train": path}
        self.checksums: dict[str, str] = {}
        self.refuse_small_pool()

    @classmethod
    def open(cls, config: DataConfig, path: Path, form: str) -> TextGroups:
        """Open groups in format `form`. Raises InputError naming file and line for a record that is not a group."""
        buffer = open_buffer(path)
        first = next(read_blocks(path, buffer), None)
        if first is None:
            raise InputError(path, "holds no groups", "one JSON object a line")
        try:
            read = reader_of(form, first.records[0])
        except Unusable as error:
            first.fail(0, error.what, error.remedy)

        def records() -> Iterator[tuple[int, int, Record]]:
            for block in read_blocks(path, buffer):
                yield from zip(block.starts.tolist(), block.numbers, block.records, strict=True)

        def build() -> Arrays:
            return index_records(records(), len(buffer), read, lambda number: f"{path}:{number}")

        key = {"version": 5, "form": form, **signature(path)}
        return cls(config, path, form, read, buffer, cached_arrays(path, form, key, build))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._config, self.path, self._form, self._scored)

    def where(self, row: int) -> str:
        before = self._buffer[: int(self._starts[row])].count(b"\n")
        return f"{self.path}:{before + 1}"

    def _lines(self, row: int) -> Lines:
        span = self._buffer[int(self._starts[row]) : int(self._starts[row + 1])]
        if self._read.grouped:
            return self._read.join([loads(line) for line in span.split(b"\n") if line.strip()])
        return self._read.one(loads(span))


def _reopened(config: DataConfig, path: Path, form: str, scored: bool) -> TextGroups:
    groups = TextGroups.open(config, path, form)
    groups._scored = scored
    return groups
