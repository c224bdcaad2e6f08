"""JSON lines, plain or gzipped: parsed by blocks with the byte span of every record, or one record at a time."""

from __future__ import annotations

import difflib
import gzip
import io
import json
import mmap
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import numpy as np

from lead_ds.errors import InputError
from lead_ds.io.json_text import kind_of

try:  # three times the speed of the standard library, and nothing else depends on it
    import orjson

    loads: Callable[[bytes], Any] = orjson.loads
    dumps: Callable[[Any], bytes] = orjson.dumps
except ImportError:

    def _refused(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def loads(line: bytes) -> Any:
        value = json.loads(line, parse_constant=_refused)
        if b"\\ud" in line.lower():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError("a lone surrogate in an escape") from None
        return value

    def dumps(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


Buffer = bytes | mmap.mmap

BLOCK = 4 << 20
LONGEST_LINE = 1 << 28  # bytes: a few kilobytes of a .gz or an archive can hold a line of any length
_BOM = b"\xef\xbb\xbf"
_UNREADABLE = (OSError, EOFError, zlib.error)  # EOFError, zlib.error: a gzip file that is cut or damaged


def require_file(path: Path, remedy: str = "check the path") -> Path:
    """`path`, or the same with `.gz` when only that exists. Raises InputError when neither does."""
    zipped = path.with_name(path.name + ".gz")
    if path.is_file():
        return path
    if path.suffix != ".gz" and zipped.is_file():
        return zipped
    if path.is_dir():
        raise InputError(path, "is a folder, not a file", remedy)
    raise InputError(path, "no such file", remedy)


def open_text(path: str | Path) -> IO[str]:
    """`path` opened as UTF-8 text, decompressed when it ends in `.gz`. Raises InputError when it is missing."""
    path = require_file(Path(path))
    try:
        if path.suffix == ".gz":
            return io.TextIOWrapper(cast(IO[bytes], gzip.open(path, "rb")), encoding="utf-8-sig")
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Every line that is not blank, with its number (from 1). Raises InputError for what cannot be read or decoded."""
    path = require_file(Path(path))
    with open_text(path) as file:
        number = 0
        try:
            for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), ""), 1):
                if len(line) > LONGEST_LINE:
                    raise too_long(path, number)
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}:{number + 1}", f"not UTF-8: {error.reason}", "convert the file to UTF-8"
            ) from None
        except _UNREADABLE as error:
            raise unreadable(path, error) from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every record with its line number (from 1). Raises InputError naming file and line for what is not JSON object."""
    path = require_file(Path(path))
    for number, line in read_lines(path):
        yield number, parse_record(line.encode(), path, number)


def parse_record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of one line; `path` and `number` name it in the InputError raised for anything else."""
    try:
        record = loads(line)
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else "nested too deeply"
        remedy = "one JSON object a line"
        if "surrogate" in what:
            remedy = "an escape such as \\ud83d is half a character: write the character itself, or take it out"
        raise InputError(f"{path}:{number}", f"not valid JSON: {what}", remedy) from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}", f"a JSON {kind_of(record)}, not an object", "one JSON object a line")
    refuse_repeated(line, record, path, number)
    return record


def refuse_repeated(line: bytes, record: Mapping[str, Any], path: Path, number: int) -> None:
    """Raise InputError for a key that a line's object has twice: a parser keeps the last, and says nothing of the first."""
    if all(line.count(_quoted(key)) < 2 for key in record):
        return
    try:
        keys = [key for key, _ in json.loads(line, object_pairs_hook=list)]
    except (ValueError, RecursionError):  # deeper, or with a longer number, than this parser takes
        return
    twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
    if twice is not None:
        raise InputError(f"{path}:{number}", f"has the key {twice!r} twice", "keep one of them")


def _quoted(key: str) -> bytes:
    return b'"%s"' % key.encode("utf-8", "replace")


def misspelt(keys: Collection[str], known: Collection[str]) -> tuple[str, str] | None:
    """The first of a record's keys that is almost one of `known` which the record lacks, and that one. Other keys are its own.

    >>> misspelt({"query_id": "q", "Negativs": [], "answers": []}, ["query_id", "negatives", "scores"])
    ('Negativs', 'negatives')
    """
    absent = [name for name in known if name not in keys]
    for key in keys if absent else ():
        if key not in known and (near := difflib.get_close_matches(key.lower(), absent, n=1, cutoff=0.8)):
            return key, near[0]
    return None


def unknown_key(key: str, near: str) -> tuple[str, str]:
    """What is wrong with a misspelt key, and what to do."""
    return f"the field {key!r} is none that is read", f"did you mean {near!r}? rename it, or take it out"


def unreadable(path: Path, error: BaseException) -> InputError:
    """What to raise when `path` exists and reading it failed."""
    return InputError(path, f"cannot be read: {error}", "check its permissions, or that it was copied whole")


def too_long(path: object, number: int) -> InputError:
    """What to raise for a line that no text is as long as."""
    return InputError(f"{path}:{number}", f"a line of more than {LONGEST_LINE >> 20} MB", "is it text?")


@dataclass
class Block:
    """Consecutive records of a file with the byte offset at which each starts."""

    path: Path
    records: list[dict[str, Any]]
    starts: np.ndarray  # int64 [n]
    numbers: Sequence[int]  # line numbers, from 1

    def fail(self, row: int, what: str, remedy: str) -> NoReturn:
        """Raise InputError for the block's record `row`, naming file and line."""
        raise InputError(f"{self.path}:{self.numbers[row]}", what, remedy)

    def refuse_misspelt(self, known: Collection[str]) -> None:
        """Raise InputError for the first record that misspells one of `known`, which would be ignored."""
        forms = {tuple(record) for record in self.records}
        if any(misspelt(form, known) for form in forms):
            for row, record in enumerate(self.records):
                if found := misspelt(record, known):
                    self.fail(row, *unknown_key(*found))


def read_blocks(path: Path, buffer: Buffer) -> Iterator[Block]:
    """The records of `buffer`, the bytes of `path`, by blocks of megabytes. Raises InputError naming file and line."""
    position, number, size = 0, 1, len(buffer)
    if buffer[:3] == _BOM:
        position = 3
    while position < size:
        end = min(position + BLOCK, size)
        if end < size:
            newline = buffer.rfind(b"\n", position, end)
            if newline < 0:  # a line longer than the block
                newline = buffer.find(b"\n", end, position + LONGEST_LINE)
                if newline < 0 and size - position > LONGEST_LINE:
                    raise too_long(path, number)
            end = newline + 1 if newline >= 0 else size
        raw = buffer[position:end]
        lines = raw.split(b"\n")
        if not lines[-1]:
            lines.pop()
        breaks = np.flatnonzero(np.frombuffer(raw, np.uint8) == ord("\n"))
        starts = np.concatenate([[0], breaks + 1])[: len(lines)] + position
        numbers: Sequence[int] = range(number, number + len(lines))
        number += len(lines)
        position = end
        try:
            records = [loads(line) for line in lines]
            valid = set(map(type, records)) <= {dict}
        except (ValueError, RecursionError):
            valid = False
        if not valid:  # blank lines, which are skipped, or a mistake, which parse_record reports
            kept = [row for row, line in enumerate(lines) if line.strip()]
            records = [parse_record(lines[row], path, numbers[row]) for row in kept]
            starts, numbers = starts[kept], [numbers[row] for row in kept]
        else:
            keys = Counter(key for form, count in Counter(map(tuple, records)).items() for key in form * count)
            if any(raw.count(_quoted(key)) > count for key, count in keys.items()):
                for line, record, line_number in zip(lines, records, numbers, strict=True):
                    refuse_repeated(line, record, path, line_number)
        if records:
            yield Block(path, records, starts.astype(np.int64), numbers)
