"""Rows of local CSV, TSV and JSON-lines files as they are written: no type is guessed, no word means "nothing".

A library that guesses makes 1 of the id 001, nothing of the text NA, and one row of the lines between two quotes of a TSV.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lead_ds.data.groups.formats import LABELS
from lead_ds.errors import InputError
from lead_ds.io.json_text import kind_of, parse_json
from lead_ds.io.jsonl import read_jsonl

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")
_BOM = "\ufeff"


def plain_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of `files`, one after the other, by column; every value of a CSV or TSV is a string but those of labels.

    JSON: an object a line, or one list of objects, which is held whole. TSV: a line is a row, a tab ends a field, quotes are
    quotes. CSV: as RFC 4180. Raises InputError naming file and line.
    """
    for path in files:
        if path.suffix in (".jsonl", ".json"):
            yield from (
                _listed(path) if path.suffix == ".json" and _is_list(path) else (row for _, row in read_jsonl(path))
            )
            continue
        rows = _tsv(path) if path.suffix == ".tsv" else _csv(path)
        _, columns = next(rows, (0, []))
        if len(set(columns)) != len(columns):
            raise InputError(f"{path}:1", "a column is named twice", "the first line names the columns")
        for number, fields in rows:
            if len(fields) != len(columns):
                what = f"{len(fields)} fields, the first line names {len(columns)} columns"
                raise InputError(f"{path}:{number}", what, "each row has every column")
            yield {name: _value(name, field) for name, field in zip(columns, fields, strict=True)}


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1 << 12).removeprefix(_BOM.encode()).lstrip().startswith(b"[")


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = parse_json(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise InputError(path, f"is not JSON: {error}", "a list of objects, or an object a line") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(path, f"entry {number} is a JSON {kind_of(row)}, not an object", "a list of objects")
        yield row


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip("\r\n"):
                    yield number, line.removesuffix("\n").removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise InputError(path, f"not UTF-8: {error.reason}", "convert the file to UTF-8") from None


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except UnicodeDecodeError as error:
            raise InputError(path, f"not UTF-8: {error.reason}", "convert the file to UTF-8") from None
        except csv.Error as error:
            what = f"is not CSV: {error}"
            raise InputError(
                f"{path}:{reader.line_num}", what, "close its quotes, or save it as TSV, where they are text"
            ) from None


def _value(column: str, field: str) -> Any:
    """A label or score as the number, or list of numbers, that it is; everything else as it is written."""
    if column not in LABELS:
        return field
    try:
        return parse_json(field)
    except ValueError:
        return field
