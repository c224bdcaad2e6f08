"""A text store: id -> row -> text, over a memory-mapped file that is never read whole.

The index holds, for n texts, the byte offset of each line, the ids in one block of bytes, and the ids' 64-bit hashes in
sorted order. All of it is mapped from disk, so an open store of millions of passages holds next to no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload
from zlib import crc32

import numpy as np

from lead_ds.errors import InputError
from lead_ds.io.jsonl import Block, Buffer, loads, read_blocks, require_file
from lead_ds.io.mapped import Arrays, cached_arrays, mapped_bytes, open_buffer, room_for, signature
from lead_ds.io.spool import Spool

Kind = Literal["corpus", "queries"]
_SORTED = 1 << 21  # values that are sorted at a time
_SHAPE = {"corpus": '{"_id", "title", "text"}', "queries": '{"_id", "text"}'}


class Texts:
    """Texts of a `corpus.jsonl` or `queries.jsonl`, addressed by row (the order of the file) or by id."""

    def __init__(self, path: Path, kind: Kind, buffer: Buffer, arrays: Arrays) -> None:
        self.path, self.kind = path, kind
        self._buffer = buffer
        self._starts, self._hashes, self._order = arrays["starts"], arrays["hashes"], arrays["order"]
        self.marks = arrays["marks"]  # uint32: equal where texts (without titles) are equal
        self.ids = Ids(arrays["ids"], arrays["id_starts"])

    @classmethod
    def open(cls, path: str | Path, kind: Kind) -> Texts:
        """Open `path` (or `path`.gz), building its index the first time.

        Raises InputError naming file and line for a malformed line, a missing field or a repeated id; naming the file
        when it is missing or empty.
        """
        path = require_file(Path(path), f"each line is {_SHAPE[kind]}").absolute()
        buffer = open_buffer(path)
        key = {"version": 3, "kind": kind, **signature(path)}
        return cls(path, kind, buffer, cached_arrays(path, kind, key, lambda: _build(path, kind, buffer)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Texts.open, (self.path, self.kind)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and int(self.rows([name])[0]) >= 0

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """The row of each id, -1 for an id that is not here. int64 [n]."""
        wanted = [name.encode() for name in names]
        hashes, words = hash_ids(wanted)
        rows = np.full(len(wanted), -1, np.int64)
        todo = np.argsort(hashes)  # neighbours in the sorted index share its memory pages
        places = np.searchsorted(self._hashes, hashes[todo])
        while len(todo):  # a second round only where two ids of the file share a hash
            inside = places < len(self._hashes)
            inside[inside] = self._hashes[places[inside]] == hashes[todo[inside]]
            todo, places = todo[inside], places[inside]
            found = self._order[places].astype(np.int64)
            same = self.ids.equal(found, words[todo])
            rows[todo[same]] = found[same]
            todo, places = todo[~same], places[~same] + 1
        return rows

    def row(self, name: str) -> int:
        """The row of one id. Raises InputError when it is not here."""
        row = int(self.rows([name])[0])
        if row < 0:
            raise InputError(self.path, f"no text has the id {name!r}", "check the ids, or that this is the right file")
        return row

    def text(self, row: int) -> str:
        """The text of a row; a passage's title goes before it, as in BEIR: (title + " " + text).strip()."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        record = loads(self._buffer[int(self._starts[row]) : int(self._starts[row + 1])])
        if self.kind == "queries":
            return record["text"]
        return passage_text(record.get("title"), record["text"])

    def body(self, row: int) -> str:
        """The text of a row without a title."""
        return loads(self._buffer[int(self._starts[row]) : int(self._starts[row + 1])])["text"]

    def asking(self, queries: Texts, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Passages that are one of the queries in `rows`, by id or by text (without a title): (places in rows, rows here)."""
        same = self.rows([queries.ids[int(row)] for row in rows])
        places = [np.flatnonzero(same >= 0)]
        found = [same[same >= 0]]
        marks = queries.marks[rows]
        order = np.argsort(marks, kind="stable")
        asked = np.unique(marks[marks != 0])  # 0: of an empty text, which asks nothing
        firsts = range(0, len(self), _SORTED)
        here = np.concatenate([np.flatnonzero(np.isin(self.marks[f : f + _SORTED], asked)) + f for f in firsts])
        firsts = np.searchsorted(marks[order], self.marks[here], "left")
        lasts = np.searchsorted(marks[order], self.marks[here], "right")
        for row, first, last in zip(here.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            body = self.body(row).strip()
            equal = [place for place in order[first:last].tolist() if queries.body(int(rows[place])).strip() == body]
            places.append(np.array(equal, np.int64))
            found.append(np.full(len(equal), row, np.int64))
        pairs = np.unique(np.stack([np.concatenate(places), np.concatenate(found)]), axis=1)
        return pairs[0], pairs[1]

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The texts of several rows, in their order."""
        return [self.text(int(row)) for row in rows]


class Ids(Sequence[str]):
    """Ids by row, decoded from one block of bytes when they are needed. gap: bytes between an id and the next."""

    def __init__(self, block: np.ndarray, starts: np.ndarray, gap: int = 0) -> None:
        self._block, self._starts, self._gap = block, starts, gap

    @classmethod
    def of_lines(cls, path: Path, remedy: str) -> Ids:
        """The lines of a file, mapped into memory: ten million strings would take a gigabyte of each process.

        Raises InputError with `remedy` when it cannot be read, or is not UTF-8 from its first line to its last.
        """
        try:
            size = path.stat().st_size
            block = mapped_bytes(path, size) if size else np.zeros(0, np.uint8)
            kind = np.uint32 if size < 1 << 32 else np.int64
            breaks = [
                (np.flatnonzero(block[f : f + _SORTED] == ord("\n")) + f + 1).astype(kind)
                for f in range(0, size, _SORTED)
            ]
            ids = cls(block, np.concatenate([np.zeros(1, kind), *breaks]), gap=1)
            for first in range(0, len(ids), 1 << 20):
                ids[first : first + (1 << 20)]
            return ids
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(path, f"cannot be read: {error}", remedy) from None

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            first, last, step = row.indices(len(self))
            if step != 1:
                return [self[i] for i in range(first, last, step)]
            cuts = self._starts[first : max(first, last) + 1].astype(np.int64)
            block = self._block[cuts[0] : cuts[-1]].tobytes()
            cuts -= cuts[0]
            lasts = (cuts[1:] - self._gap).tolist()
            return [block[a:b].decode() for a, b in zip(cuts[:-1].tolist(), lasts, strict=True)]
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._block[int(self._starts[row]) : int(self._starts[row + 1]) - self._gap].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 65536):
            yield from self[first : first + 65536]

    def take(self, rows: np.ndarray) -> list[str]:
        """The ids of many rows, in their order."""
        block = self._block.data
        firsts, lasts = self._starts[rows].tolist(), (self._starts[rows + 1] - self._gap).tolist()
        return [str(block[first:last], "utf-8") for first, last in zip(firsts, lasts, strict=True)]

    def equal(self, rows: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Whether the id of each row is the given one, its bytes zero-padded to uint64 [n, W] words. bool [n]."""
        if not len(rows):
            return np.zeros(0, bool)
        width = words.shape[1] * 8
        first, last = self._starts[rows].astype(np.int64), self._starts[rows + 1].astype(np.int64) - self._gap
        columns = np.arange(width)
        inside = columns < (last - first)[:, None]
        positions = np.where(inside, first[:, None] + columns, 0)
        mine = np.where(inside, self._block[positions], 0).astype(np.uint8)
        return (mine == words.view(np.uint8).reshape(len(rows), width)).all(1) & (last - first <= width)


def passage_text(title: object, text: str) -> str:
    """A passage as BEIR and sentence-transformers read it."""
    return f"{title} {text}".strip() if title else text


def hash_ids(names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each id, the same in every process, and the ids' bytes as uint64 [n, W] zero-padded words."""
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    words = max(1, -(-int(lengths.max(initial=0)) // 8))
    padded = np.array(names, dtype=f"S{words * 8}") if len(names) else np.zeros(0, f"S{words * 8}")
    table = padded.view(np.uint64).reshape(len(names), words)
    hashes = _mix(lengths.astype(np.uint64))
    for column in range(words):
        active = lengths > 8 * column
        hashes = np.where(active, _mix(hashes ^ table[:, column]), hashes)
    return hashes, table


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit. uint64 [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _build(path: Path, kind: Kind, buffer: Buffer) -> Arrays:
    folder = room_for(path)
    starts, hashes, marks, ids, id_starts = (
        Spool(dtype, folder) for dtype in (np.int64, np.uint64, np.uint32, np.uint8, np.int64)
    )
    last = 0
    for block in read_blocks(path, buffer):
        names = _names(block, kind)
        for first in range(0, len(names), 8192):  # short runs: one very long id widens only its own
            hashes.add(hash_ids(names[first : first + 8192])[0])
        starts.add(block.starts)
        marks.add(
            np.array([crc32(record["text"].strip().encode("utf-8", "replace")) for record in block.records], np.uint32)
        )
        ids.add(np.frombuffer(b"".join(names), np.uint8))
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        id_starts.add(np.cumsum(lengths) + last - lengths)
        last += int(lengths.sum())
    if not starts.size:
        raise InputError(path, "holds no texts", f"each line is {_SHAPE[kind]}")
    starts.add(np.array([len(buffer)]))
    id_starts.add(np.array([last]))
    ids.add(np.zeros(1, np.uint8))  # never empty, so that it can be indexed
    arrays = {"starts": starts.whole(), "ids": ids.whole(), "id_starts": id_starts.whole(), "marks": marks.whole()}
    arrays |= _sorted(hashes.whole(), folder)
    _refuse_duplicates(path, buffer, arrays)
    return arrays


def _sorted(hashes: np.ndarray, folder: Path | None) -> Arrays:
    """Hashes in order, and the row of each; equal ones by row. A range of values at a time, so that few lie in memory."""
    found, order = Spool(np.uint64, folder), Spool(np.uint32 if len(hashes) < 1 << 32 else np.int64, folder)
    bits = max(0, (len(hashes) // _SORTED).bit_length())
    for bucket in range(1 << bits):
        rows = []
        for first in range(0, len(hashes), _SORTED):
            here = hashes[first : first + _SORTED]
            inside = here >> np.uint64(64 - bits) == bucket if bits else np.ones(len(here), bool)
            rows.append(np.flatnonzero(inside) + first)
        row = np.concatenate(rows)
        row = row[np.argsort(hashes[row], kind="stable")]
        order.add(row)
        found.add(hashes[row])
    return {"hashes": found.whole(), "order": order.whole()}


def _names(block: Block, kind: Kind) -> list[bytes]:
    """The ids of a block; raises InputError for a record without an id or a text, or with a title by another name."""
    if kind == "corpus":
        block.refuse_misspelt(("title",))
    try:
        names = [record["_id"] for record in block.records]
        kinds = {type(record["text"]) for record in block.records}
        titles = {type(record.get("title")) for record in block.records} if kind == "corpus" else set()
        if kinds == {str} and titles <= {str, type(None)}:
            return [(name if type(name) is str else _name(name)).encode() for name in names]
    except (KeyError, TypeError):
        pass
    for row, record in enumerate(block.records):
        for field in ("_id", "text"):
            if field not in record:
                block.fail(row, f"no field {field!r}", f"each line is {_SHAPE[kind]}")
        if not isinstance(record["_id"], str | int) or isinstance(record["_id"], bool):
            block.fail(row, "the field '_id' is not a string", f"each line is {_SHAPE[kind]}")
        if not isinstance(record["text"], str):
            block.fail(row, "the field 'text' is not a string", f"each line is {_SHAPE[kind]}")
        if kind == "corpus" and not isinstance(record.get("title"), str | None):
            block.fail(row, "the field 'title' is not a string", 'write it as one, or "" for no title')
    raise AssertionError("a block that fails has a record that fails")


def _name(name: object) -> str:
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)  # qrels and runs are text: 7 and "7" name the same passage there
    raise TypeError


def _refuse_duplicates(path: Path, buffer: Buffer, arrays: Arrays) -> None:
    hashes, order = arrays["hashes"], arrays["order"]
    ids = Ids(arrays["ids"], arrays["id_starts"])
    lines = []
    equal: list[int] = []
    for first in range(0, len(hashes) - 1, _SORTED):
        here = hashes[first : first + _SORTED + 1]
        equal += (np.flatnonzero(here[1:] == here[:-1]) + first).tolist()
    for i in equal:
        first = i
        while first >= 0 and hashes[first] == hashes[i]:  # more than two ids may share a hash
            if ids[int(order[first])] == ids[int(order[i + 1])]:
                lines.append((int(order[i + 1]), int(order[first])))
            first -= 1
    if lines:
        row, earlier = min(lines)
        numbers = [_line_number(buffer, int(arrays["starts"][r])) for r in (row, earlier)]
        raise InputError(
            f"{path}:{numbers[0]}", f"the id {ids[row]!r} is already on line {numbers[1]}", "ids must be unique"
        )


def _line_number(buffer: Buffer, offset: int) -> int:
    count = 1
    for first in range(0, offset, 1 << 24):
        count += buffer[first : min(offset, first + (1 << 24))].count(b"\n")
    return count
