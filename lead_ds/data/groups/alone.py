"""Texts alone: a file of texts, or a folder of such files, with no judgement, no negative and no id (`data.format: texts`).

Files are JSON lines, plain lines or parquet, also gzipped. Opening reads each once, checks every line and keeps where it
starts, mapped from disk; a draw reads its own line again. So a file may be larger than memory. Parquet and a large .gz
are unpacked once, into the folder of derived files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from lead_ds.data.collections.texts import passage_text
from lead_ds.data.groups.formats import key_of
from lead_ds.data.groups.group import Group, Pool, no_scores
from lead_ds.errors import InputError, RunError
from lead_ds.io.jsonl import Buffer, dumps, loads, read_blocks
from lead_ds.io.mapped import Arrays, cache_dir, cached_arrays, locked, open_buffer, path_hash, replaced, signature

if TYPE_CHECKING:
    from lead_ds.settings.data import DataConfig

Role = Literal["query", "passage"]
ENDS = re.compile(r"\.(jsonl|json|txt|text|parquet)(\.gz)?$")
FIELDS: dict[str, Role] = {"query": "query", "text": "passage", "passage": "passage", "document": "passage"}
_SHAPE = '{"text"} or {"query"}, with "title" and "role" (query or passage) if there are any'
_ASKING = 1  # what the key of a text that is read as a query differs by: its vector is not that of the passage


class TextsAlone:
    """Texts as groups of one passage and no query each. Picklable.

    A text is read as a query or as a passage: as `data.role` says, else as its own "role" or the name of its field
    says. Else the name of its file says it: one that begins with "quer" holds queries.
    """

    alone = True
    has_scores = False
    identical = 0
    short = 0

    def __init__(self, config: DataConfig, path: Path, files: list[TextFile]) -> None:
        self._config, self.path, self._files = config, path, files
        self._ends = np.cumsum([len(file) for file in files])
        self.sources = {"train": path} if path.is_file() else {f"train: {file.path.name}": file.path for file in files}
        self.checksums: dict[str, str] = {}

    @classmethod
    def open(cls, config: DataConfig, path: Path) -> TextsAlone:
        """Open a file, or the files of a folder. Raises InputError naming file and line for what is no text."""
        paths = [path] if path.is_file() else sorted(file for file in path.iterdir() if ENDS.search(file.name))
        if not paths:
            raise InputError(
                path, "holds no texts", "name a file of texts, or a folder of .jsonl, .txt or .parquet files"
            )
        files = [TextFile.open(file, config.role) for file in paths]
        if not any(map(len, files)):
            raise InputError(path, "holds no texts", f"each line is a text, or {_SHAPE}")
        return cls(config, path, files)

    def __reduce__(self) -> tuple[Any, ...]:
        return TextsAlone.open, (self._config, self.path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, row: int, seed: int, epoch: int, progress: float | None = None) -> Group:
        """See `Groups.draw`: the same text, whatever the others are."""
        file, place = self._file_of(row)
        text, role = file[place]
        key = key_of(text) ^ (_ASKING if role == "query" else 0)
        name = f"{file.path.name}:{place}"
        return Group(name, "", [name], [text], np.array([key], np.int64), np.zeros(0, np.int64), role=role)

    def pool(self, row: int) -> Pool:
        group = self.draw(row, 0, 0)
        return Pool("", group.keys, group.passages, group.role)

    def listed(self, row: int) -> tuple[int, np.ndarray]:
        return 0, self.draw(row, 0, 0).keys

    def offered(self, row: int) -> int:
        return 0

    def where(self, row: int) -> str:
        file, place = self._file_of(row)
        return file.where(place)

    def scored(self) -> NoReturn:
        """See `Groups.scored`. Raises InputError: texts alone have no scores."""
        raise no_scores(self)

    def _file_of(self, row: int) -> tuple[TextFile, int]:
        at = int(np.searchsorted(self._ends, row, "right"))
        return self._files[at], row - (int(self._ends[at - 1]) if at else 0)


class TextFile:
    """The texts of one file, by place. `starts` [n + 1] of lines in its bytes."""

    def __init__(self, path: Path, buffer: Buffer, starts: np.ndarray, plain: bool, role: Role | None) -> None:
        self.path, self._buffer, self._starts, self._plain, self._role = path, buffer, starts, plain, role
        self._named: Role = "query" if path.name.lower().startswith("quer") else "passage"

    @classmethod
    def open(cls, path: Path, role: Role | None) -> TextFile:
        """role: of every text of it; None: see `TextsAlone`."""
        plain = ".txt" in path.suffixes or ".text" in path.suffixes
        source = unpacked(path) if ".parquet" in path.suffixes else path
        buffer = open_buffer(source)

        def build() -> Arrays:
            return {"starts": _plain_lines(path, buffer) if plain else _records(path, buffer, role)}

        key = {"version": 2, "plain": plain, **signature(source)}
        return cls(path, buffer, cached_arrays(source, "alone", key, build)["starts"], plain, role)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: int) -> tuple[str, Role]:
        """A text, and how it is read."""
        line = self._buffer[int(self._starts[place]) : int(self._starts[place + 1])]
        if self._plain:
            return line.decode().strip(), self._role or self._named
        text, role = text_of(loads(line.split(b"\n", 1)[0]))
        return text, self._role or role or self._named

    def where(self, place: int) -> str:
        """File and line of a text."""
        before = self._buffer[: int(self._starts[place])].count(b"\n")
        return f"{self.path}:{before + 1}"


def text_of(record: dict[str, Any]) -> tuple[str, Role | None]:
    """The text of a record, and its role, where it or its field's name says one. Raises ValueError for what is no text.

    >>> text_of({"title": "Dogs", "text": "bark"}), text_of({"query": "who barks"})
    (('Dogs bark', None), ('who barks', 'query'))
    """
    field = next((name for name in FIELDS if name in record), None)
    if field is None:
        raise ValueError("no text: no field " + ", ".join(map(repr, FIELDS)))
    text, role = record[field], record.get("role")
    if not isinstance(text, str):
        raise ValueError(f"the field {field!r} is not a text")
    if role not in (None, "query", "passage"):
        raise ValueError(f"the role {role!r} is not query or passage")
    return passage_text(record.get("title"), text), role or (None if field == "text" else FIELDS[field])


def holds_texts_alone(path: Path) -> bool:
    """Whether a file or folder of `data.format: texts` holds texts alone, and not groups that list theirs."""
    if path.is_dir() or not re.search(r"\.jsonl?(\.gz)?$", path.name):
        return True
    first = next(read_blocks(path, open_buffer(path)), None)
    return first is None or "positives" not in first.records[0]


def unpacked(path: Path) -> Path:
    """A parquet file as JSON lines in the folder of derived files, made once, a batch of rows at a time."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(path, "is parquet, which needs pyarrow", "pip install pyarrow") from None
    if path.suffix == ".gz":
        raise InputError(path, "is gzipped parquet", "unpack it: parquet is compressed inside")
    mark = "-".join(map(str, signature(path).values()))
    target = cache_dir() / "texts" / f"{path_hash(path)}-{mark}-{path.stem}.jsonl"
    if target.is_file():
        return target

    def write(temporary: Path) -> None:
        names = ("role", "title", *FIELDS)
        with parquet.ParquetFile(path) as file, temporary.open("wb") as out:
            columns = [name for name in file.schema_arrow.names if name in names]
            for batch in file.iter_batches(columns=columns):
                out.writelines(dumps(record) + b"\n" for record in batch.to_pylist())

    try:
        with locked(target):
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                replaced(target, write)
    except OSError as error:
        raise RunError(target, f"cannot be written: {error}", "set LEAD_DS_CACHE to a writable folder") from None
    except Exception as error:  # pyarrow's, of a file that is damaged, or none of parquet
        raise InputError(path, f"cannot be read as parquet: {error}", "check that it was copied whole") from None
    return target


def _records(path: Path, buffer: Buffer, role: Role | None) -> np.ndarray:
    starts = []
    for block in read_blocks(path, buffer):
        block.refuse_misspelt(("title", "role"))
        for row, record in enumerate(block.records):
            try:
                text_of(record)
            except ValueError as error:
                block.fail(row, str(error), f"each line is {_SHAPE}")
        starts.append(block.starts)
    return np.concatenate([*starts, [len(buffer)]]).astype(np.int64)


def _plain_lines(path: Path, buffer: Buffer) -> np.ndarray:
    """Where lines that are not blank start; and the end."""
    return np.fromiter(_starts(path, buffer), np.int64)


def _starts(path: Path, buffer: Buffer) -> Iterator[int]:
    position, number, size = (3 if buffer[:3] == b"\xef\xbb\xbf" else 0), 0, len(buffer)
    while position < size:
        end = buffer.find(b"\n", position) + 1 or size
        number += 1
        try:
            if buffer[position:end].decode().strip():
                yield position
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}", f"not UTF-8: {error.reason}", "convert the file to UTF-8") from None
        position = end
    yield size
