"""Files that a reader sees whole or not at all, and checksums of models and data."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.errors import InputError, RunError
from lead_ds.io.adapters import adapter_of
from lead_ds.io.json_text import kind_of, parse_json
from lead_ds.io.mapped import cached_arrays, signature
from lead_ds.io.notes import say_once

# What decides a model's vectors, in a Hugging Face or sentence-transformers directory.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "vocab*")
_PER_MODEL = {"README.md", "training_args.bin"}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file to fill, renamed to `path` when the block ends well. Raises RunError when it cannot be written."""
    handle, temporary = -1, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary(path)
        yield Path(temporary)
        sync(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = ""
    except write_errors() as error:
        raise RunError(path, f"cannot be written: {error}", "check the folder and the free space") from None
    finally:
        with suppress(OSError):  # "" and -1: there is none
            os.unlink(temporary)
        with suppress(OSError):
            os.close(handle)


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_errors() -> tuple[type[Exception], ...]:
    """What the writing of a file raises on a full disk: safetensors has an error of its own, which is no OSError."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _temporary(path: Path) -> tuple[int, str]:
    """An empty file beside `path`, open. Where there are locks it is the one that a killed process left, so that kills do not
    fill the disk; what a living process holds is let alone."""
    fresh = partial(tempfile.mkstemp, dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        import fcntl
    except ImportError:  # Windows
        return fresh()
    name = str(path.with_name(f".{path.name}.{socket.gethostname()}.tmp"))
    try:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # too long a name, or a link
        return fresh()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(handle)
        # Another process may have renamed it to `path` since it was opened, and in a folder of all users it may be another's.
        if os.path.samestat(found, os.stat(name)) and found.st_uid == os.geteuid() and found.st_nlink == 1:
            os.ftruncate(handle, 0)
            return handle, name
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # no locks here
        os.unlink(name)
    os.close(handle)
    return fresh()


@contextmanager
def alone(folder: Path, who: str, remedy: str) -> Iterator[int]:
    """`folder`, made where it is absent, to this process alone: a lock on it, as an open descriptor.

    Raises InputError, of `who` and with `remedy`, where another process has it; RunError when it cannot be made.
    """
    import fcntl  # not on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RunError(folder, f"cannot be made: {error}", "check the path and its permissions") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(folder, f"{who} is at work here", remedy) from None
        yield handle
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically. Raises RunError for a number that is not finite, which is not JSON."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise RunError(path, f"{_not_finite(value)} is not finite", "see what computed it") from None
    with atomic(path) as temporary:  # half a character is written as its escape, which JSON has
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def _not_finite(value: Any, name: str = "") -> str:
    """The dotted name of the first number that is not finite; "" where there is none."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name or "a number"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for key, part in items if (found := _not_finite(part, f"{name}.{key}".lstrip(".")))), "")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError with `remedy` when it is absent or not one."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "no such file", remedy) from None
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be read: {error}", remedy) from None
    if not isinstance(value, dict):
        raise InputError(path, f"a JSON {kind_of(value)}, not an object", remedy)
    return value


def checksum(paths: Iterable[Path], name: Callable[[Path], str] = lambda path: path.name) -> str:
    """A hash of the names and contents of files. Raises InputError for one that cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(name(path).encode() + b"\0")
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise InputError(path, f"cannot be read: {error}", "check its permissions") from None
    return digest.hexdigest()


def data_checksum(path: Path) -> str:
    """`checksum` of one file of texts, remembered beside it as long as its size and time of change stay the same."""
    key = {"version": 1, **signature(path)}

    def build() -> dict[str, np.ndarray]:
        return {"digest": np.frombuffer(bytes.fromhex(checksum([path])), np.uint8)}

    return cached_arrays(path, "checksum", key, build)["digest"].tobytes().hex()


def data_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """`data_checksum` of files in a folder, by name: what `check_written` compares."""
    return {name: data_checksum(folder / name) for name in names}


def check_written(folder: Path, names: Iterable[str], sums: Any, again: str) -> None:
    """Raise InputError, with the remedy `again`, for a file that is not as it was written; say once where nobody can tell.

    sums: of `data_checksums`, from the folder's record; None of one that an earlier version, or another hand, has written.
    """
    if not isinstance(sums, dict):
        say_once(f"{folder}: has no checksums, so that its files are read as they are, damaged or not")
        return
    for name in names:
        if sums.get(name) != data_checksum(folder / name):
            raise InputError(folder / name, "is not as it was written", again)


def model_checksum(path: str | Path) -> str:
    """A hash of the files that decide what a model's directory computes; of the name for a model of the hub."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()
    files = model_files(folder)
    names = {file: name for name, file in files.items()}
    return checksum(files.values(), names.__getitem__)


def model_files(folder: Path) -> dict[str, Path]:
    """The files that decide what a model's directory computes, by name and sorted; of an adapter, its base's too."""
    found = {file for pattern in _MODEL_FILES for file in folder.glob(f"**/{pattern}")}
    files = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(found)
        if file.is_file() and file.name not in _PER_MODEL
    }
    adapter = adapter_of(str(folder))
    if adapter is not None and adapter.base != adapter.folder:
        files |= {f"base/{name}": file for name, file in model_files(adapter.base).items()}
    return files
