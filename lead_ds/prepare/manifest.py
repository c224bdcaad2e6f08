"""`prepare.json`: what was prepared from what, each finished file with its size and checksum; and the folder it is in."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lead_ds import __version__
from lead_ds.errors import InputError
from lead_ds.io.files import alone, atomic, checksum, read_json, write_json
from lead_ds.io.owner import RECORD, owned
from lead_ds.prepare.source import Source

NAME = "prepare.json"
_VERSION = 1


class Output:
    """A file being written: counts its rows, hashes its bytes as `io.files.checksum` would."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._digest = hashlib.blake2b(name.encode() + b"\0", digest_size=16)
        self._size = 0
        self.facts: dict[str, Any] = {}

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def entry(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {"size": self._size, "checksum": self._digest.hexdigest(), **self.facts}


class Manifest:
    """The manifest of `folder`, which this process has to itself."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.folder, self._tree = folder, tree
        self._current: dict[str, Any] = {}

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Finished files by name: size, checksum, rows and other counts, keys of what they were made from."""
        return self._tree["files"]

    @property
    def complete(self) -> bool:
        """Whether the source that was begun is finished."""
        return self._current["complete"]

    @property
    def shared(self) -> bool:
        """Whether another source was prepared here too."""
        return len(self._tree["sources"]) > 1

    def begin(self, source: Source) -> None:
        """Note that `source` is being prepared here. Raises InputError when the folder is another source's."""
        for known in self._tree["sources"]:
            if (known["kind"], known["source"]) == (source.kind, source.name):
                self._current = known
                return
            if known["corpus"] and (source.corpus is not None or not known["complete"]):
                what = "holds" if known["complete"] else "holds an unfinished"
                remedy = "give another folder, or --overwrite to start over" if source.corpus else "finish it first"
                raise InputError(self.folder, f"{what} {known['kind']} of {known['source']}", remedy)
        self._current = {"kind": source.kind, "source": source.name, "corpus": source.corpus is not None}
        self._current |= {"complete": False, "versions": source.versions}
        self._tree["sources"].append(self._current)
        self._write()

    def finish(self) -> None:
        """Note that all files of the source are finished."""
        self._current["complete"] = True
        self._write()

    def holds(self, name: str) -> bool:
        """Whether a file is finished, and its bytes are those that were written."""
        path, entry = self.folder / name, self.files.get(name)
        if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
            return False
        return checksum([path]) == entry["checksum"]

    @contextmanager
    def writing(self, name: str, key: str, extends: bool) -> Iterator[Output]:
        """A file to fill; in its place and recorded when the block ends well. Raises RunError when it cannot be written.

        `key` stands for what it is made from; `extends`: what it was made from before is still in it.
        """
        path = self.folder / name
        with atomic(path) as temporary, temporary.open("wb", buffering=1 << 20) as file:
            output = Output(file, path.name)
            yield output
        keys = self.files.get(name, {}).get("keys", []) if extends else []
        self.files[name] = {**output.entry(), "keys": [*keys, key]}
        self._write()

    def forget(self, name: str) -> None:
        """Take a file away again."""
        (self.folder / name).unlink(missing_ok=True)
        self.files.pop(name, None)
        self._write()

    def clean(self) -> None:
        """Take away what a killed prepare left half written."""
        for name in (".*.tmp", "qrels/.*.tmp"):
            for path in self.folder.glob(name):
                path.unlink(missing_ok=True)
        shutil.rmtree(parts_folder(self.folder), ignore_errors=True)

    def abandon(self, keys: Iterable[str]) -> None:
        """Leave no trace of the source where none of its files (by `keys`) was finished."""
        if self._current["complete"] or any(set(entry["keys"]) & set(keys) for entry in self.files.values()):
            return
        self._tree["sources"].remove(self._current)
        if self._tree["sources"]:
            self._write()
            return
        self.clean()
        (self.folder / NAME).unlink(missing_ok=True)
        for folder in (self.folder / "qrels", self.folder):
            with suppress(OSError):
                folder.rmdir()

    def _write(self) -> None:
        write_json(self.folder / NAME, self._tree)


def parts_folder(folder: Path) -> Path:
    """Where training pairs are sorted by query."""
    return folder / ".prepare-parts"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's tree. Raises InputError when it is absent or of another version."""
    tree = read_json(folder / NAME, "name a folder that lead-ds prepare wrote")
    if tree.get("version") != _VERSION:
        remedy = "prepare it again with --overwrite"
        raise InputError(folder / NAME, f"is of version {tree.get('version')!r}, not {_VERSION}", remedy)
    return tree


@contextmanager
def open_manifest(folder: Path, overwrite: bool) -> Iterator[Manifest]:
    """The manifest of `folder`, made when it is absent or empty; nobody else prepares there meanwhile.

    `overwrite`: the files of the manifest that is there are removed first. Raises InputError when the folder holds
    anything that this program did not prepare, RunError when it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(folder, "is a file, not a folder", "name another folder")
    known = (folder / NAME).is_file()
    if not known and folder.is_dir() and any(not _ours(path) for path in folder.iterdir()):
        raise InputError(folder, f"holds something else: there is no {NAME}", "name an empty or a new folder")
    tree = read_manifest(folder) if known and not overwrite else None
    other = "another lead-ds prepare"
    with alone(folder, other, "wait for it to end"), owned(folder, other):
        if known and overwrite:
            old = read_json(folder / NAME, "remove the folder yourself")
            for name in old.get("files", {}):
                (folder / name).unlink(missing_ok=True)
            (folder / NAME).unlink()
        versions = {"lead_ds": __version__, "python": platform.python_version()}
        manifest = Manifest(folder, tree or {"version": _VERSION, "versions": versions, "sources": [], "files": {}})
        manifest.clean()
        yield manifest


def _ours(path: Path) -> bool:
    return (path.name.startswith(f".{NAME}.") and path.name.endswith(".tmp")) or path.name.startswith(RECORD)
