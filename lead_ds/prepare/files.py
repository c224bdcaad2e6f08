"""Published files where they lie: plain or `.gz`, in a folder, a tar (gzipped or not) or a zip; read by blocks of lines."""

from __future__ import annotations

import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from lead_ds.data.collections.qrels import parse_judgements
from lead_ds.errors import InputError
from lead_ds.io.jsonl import LONGEST_LINE, parse_record, too_long, unreadable
from lead_ds.io.mapped import signature
from lead_ds.prepare.source import Judgement, Part, Text, Tick

BLOCK = 4 << 20
_TAR = (".tar", ".tar.gz", ".tgz")
# Cut, damaged, encrypted or unheard-of archives.
_UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    RuntimeError,  # encrypted; NotImplementedError, of another compression
    ValueError,  # offsets and names that cannot be
    KeyError,
)
Lines = tuple[int, list[str]]  # the number of the first line (from 1), and lines without their ends


@dataclass(frozen=True)
class File:
    """A published file, on its own or inside an archive."""

    path: Path
    size: int  # bytes, compressed where it lies alone
    member: tarfile.TarInfo | zipfile.ZipInfo | None = None

    @property
    def inner(self) -> str:
        """Its path inside the archive, or its name."""
        if self.member is None:
            return self.path.name
        return self.member.name if isinstance(self.member, tarfile.TarInfo) else self.member.filename

    @property
    def name(self) -> str:
        """Its published name, without folders and `.gz`."""
        return self.inner.rsplit("/", 1)[-1].removesuffix(".gz")

    def __str__(self) -> str:
        return f"{self.path}/{self.inner}" if self.member is not None else str(self.path)

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The decompressed bytes, and the stream below whose `tell()` runs to `size`. Raises InputError."""
        with ExitStack() as stack:
            try:
                raw: IO[bytes] = self._raw(stack)
                data = raw
                if self.inner.endswith(".gz"):
                    data = cast(IO[bytes], stack.enter_context(gzip.open(raw, "rb")))
            except _UNREADABLE as error:
                raise unreadable(self.path, error) from None
            yield data, raw

    def _raw(self, stack: ExitStack) -> IO[bytes]:
        if isinstance(self.member, tarfile.TarInfo):
            archive = stack.enter_context(tarfile.open(self.path))  # noqa: SIM115
            found = archive.extractfile(self.member)
            assert found is not None  # only regular files are listed
            return stack.enter_context(found)
        if isinstance(self.member, zipfile.ZipInfo):
            return stack.enter_context(stack.enter_context(zipfile.ZipFile(self.path)).open(self.member))
        return stack.enter_context(self.path.open("rb"))


def list_files(source: Path, skip: Sequence[str] = ()) -> list[File]:
    """The files of a folder (with its subfolders), of an archive, or the one file that `source` is.

    Archives of a folder are looked into, unless their names begin with one of `skip`; a file that lies there unpacked
    comes first. Raises InputError when `source` is missing, empty or cannot be read.
    """
    if not source.exists():
        raise InputError(source, "no such file or folder", "SRC is the published folder, archive or file")
    paths = [source]
    if source.is_dir():
        inside = (path for path in source.rglob("*") if path.is_file())
        paths = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(source).parts))
    plain = [File(path, path.stat().st_size) for path in paths if not _is_archive(path)]
    packed = [path for path in paths if _is_archive(path) and not path.name.startswith(tuple(skip))]
    found = plain + [file for path in packed for file in _members(path)]
    if not found:
        raise InputError(source, "holds no files", "SRC is the published folder, archive or file")
    return found


def _is_archive(path: Path) -> bool:
    return path.name.endswith((*_TAR, ".zip"))


def _members(path: Path) -> list[File]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                # Not is_dir(), which fails on a member without a name.
                members = [info for info in archive.infolist() if not info.filename.endswith("/")]
                return [File(path, info.file_size, info) for info in members if _shown(info.filename)]
        with tarfile.open(path) as tar:
            return [File(path, info.size, info) for info in tar if info.isfile() and _shown(info.name)]
    except _UNREADABLE as error:
        raise unreadable(path, error) from None


def _shown(name: str) -> bool:
    return name != "" and not any(part.startswith((".", "__MACOSX")) and part != "." for part in name.split("/"))


def identity(files: Iterable[File]) -> dict[str, Any]:
    """What shows whether the files on disk are still the same."""
    return {str(file.path) if file.member is None else str(file): signature(file.path) for file in files}


def read_blocks(file: File, tick: Tick) -> Iterator[Lines]:
    """The lines of a file, by blocks of megabytes. Only a newline ends a line: texts may hold any other break.

    Raises InputError naming file and line for what cannot be read or is not UTF-8.
    """
    number, rest, done = 1, bytearray(), 0
    with file.open() as (data, raw):
        while True:
            try:
                chunk = data.read(BLOCK)
                position = raw.tell()
            except _UNREADABLE as error:
                raise unreadable(file.path, error) from None
            tick(position - done)
            done = position
            if len(rest) > LONGEST_LINE:
                raise too_long(file, number)
            # Only what is new is looked through: a line of many chunks would be read over and over.
            cut = chunk.rfind(b"\n") + 1
            rest += chunk[:cut]
            if rest and (cut or not chunk):
                lines = _decode(bytes(rest), file, number)
                yield number, lines
                number += len(lines)
                rest.clear()
            rest += chunk[cut:]
            if not chunk:
                return


def _decode(block: bytes, file: File, number: int) -> list[str]:
    if number == 1:
        block = block.removeprefix(b"\xef\xbb\xbf")
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        line = number + block.count(b"\n", 0, error.start)
        raise InputError(f"{file}:{line}", f"not UTF-8: {error.reason}", "convert the file to UTF-8") from None
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n")


def part(files: Sequence[File], read: Any) -> Part[Any]:
    """The records that `read(file, tick)` yields of each file, one file after the other."""

    def chain(tick: Tick) -> Iterator[Any]:
        for file in files:
            yield from read(file, tick)

    return Part(chain, sum(file.size for file in files), identity=identity(files))


def tsv_texts(columns: int, title: int | None, shape: str) -> Any:
    """A reader of texts: the id first, `title`'s column, the text last; a tab inside the text belongs to it."""

    def read(file: File, tick: Tick) -> Iterator[Text]:
        for first, lines in read_blocks(file, tick):
            for number, line in enumerate(lines, first):
                fields = line.split("\t", columns - 1)
                if len(fields) == columns and fields[0]:
                    yield Text(fields[0], "" if title is None else fields[title], fields[-1])
                elif line.strip():
                    raise InputError(f"{file}:{number}", f"not {shape}: {line[:80]!r}", "columns are separated by tabs")

    return read


def jsonl_texts(name: str, text: str, title: str | None) -> Any:
    """A reader of JSON lines: the fields of the id, the text and the title (which may be absent)."""

    def read(file: File, tick: Tick) -> Iterator[Text]:
        shape = f"each line has the fields {name!r} and {text!r}"
        for first, lines in read_blocks(file, tick):
            for number, line in enumerate(lines, first):
                if not line.strip():
                    continue
                record = parse_record(line.encode(), Path(str(file)), number)
                label, body = record.get(name), record.get(text)
                if isinstance(label, int) and not isinstance(label, bool):
                    label = str(label)
                if not isinstance(label, str) or not isinstance(body, str):
                    wrong = text if isinstance(label, str) else name
                    what = f"the field {wrong!r} is not a string" if wrong in record else f"no field {wrong!r}"
                    raise InputError(f"{file}:{number}", what, shape)
                head = record.get(title) if title else None
                yield Text(label, head if isinstance(head, str) else "", body)

    return read


def judgements(file: File, tick: Tick) -> Iterator[Judgement]:
    """Judgements in BEIR's or TREC's columns. Raises InputError naming file and line."""
    lines = (
        (number, line)
        for first, block in read_blocks(file, tick)
        for number, line in enumerate(block, first)
        if line.strip()
    )
    for number, query, passage, score in parse_judgements(lines, file):
        yield Judgement(f"{file}:{number}", query, passage, score)
