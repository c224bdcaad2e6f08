"""Indexes of big files: arrays built once, kept beside the file (or in the cache folder) and mapped into memory."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.errors import RunError
from lead_ds.io.json_text import parse_json
from lead_ds.io.jsonl import Buffer, unreadable
from lead_ds.io.waiting import holder, told_while_waiting

Arrays = dict[str, np.ndarray]
Signature = dict[str, Any]

_MAGIC = b"LEADIDX1"
_ALIGN = 64
# Files below this size (on disk) are indexed in memory in well under a second; nothing is written for them.
MIN_CACHED_BYTES = 8 << 20
MOST_UNPACKED = 1 << 28  # bytes of a small .gz that are held in memory: some grow a thousandfold


def cache_dir() -> Path:
    """Where derived files go: $LEAD_DS_CACHE, else $XDG_CACHE_HOME/lead-ds, else ~/.cache/lead-ds."""
    own = os.environ.get("LEAD_DS_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lead-ds"


def signature(path: Path) -> Signature:
    """What identifies the content of `path` cheaply: size and time of the last change."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return {"size": status.st_size, "mtime": status.st_mtime_ns}


def open_buffer(path: Path) -> Buffer:
    """The bytes of `path` as something to slice: mapped into memory, or decompressed when it ends in `.gz`.

    A small `.gz` is decompressed in memory; a big one, or one that grows beyond MOST_UNPACKED, once, into the cache folder.
    Raises InputError when `path` cannot be read, RunError when the decompressed file cannot be written.
    """
    try:
        if path.suffix == ".gz":
            if path.stat().st_size < MIN_CACHED_BYTES:
                with gzip.open(path, "rb") as packed:
                    data = packed.read(MOST_UNPACKED + 1)
                if len(data) <= MOST_UNPACKED:
                    return data
                del data
            path = _decompressed(path)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise unreadable(path, error) from None


def cached_arrays(source: Path, name: str, key: Signature, build: Callable[[], Arrays]) -> Arrays:
    """The arrays that `build` makes of `source`, from an earlier call with the same `key` if there was one.

    Kept in `.SOURCE.NAME.idx` beside `source` where that folder can be written, else in the cache folder; when neither
    can, in memory. Written whole or not at all; processes of one machine that need the same arrays wait for the first
    of them to build. Sources below MIN_CACHED_BYTES are built again each time and nothing is written.
    """
    if signature(source)["size"] < MIN_CACHED_BYTES:
        return build()
    file = f".{source.name}.{name}.idx"
    beside, cache = _folders(source)
    places = [beside / file, cache / f"{path_hash(source)}{file}"]
    for place in places:
        found = read_arrays(place, key)
        if found is not None:
            return found
    with locked(places[1]):
        for place in places:
            found = read_arrays(place, key)  # another process may have built it while this one waited
            if found is not None:
                return found
        arrays = build()
        for place in places:
            with contextlib.suppress(OSError):
                write_arrays(place, key, arrays)
                return read_arrays(place, key) or arrays
    return arrays


def _folders(source: Path) -> tuple[Path, Path]:
    return source.parent, cache_dir() / "indexes"


def room_for(source: Path) -> Path | None:
    """The folder where an index of `source` will be, for what is too big to hold while it is made; None: hold it."""
    if signature(source)["size"] >= MIN_CACHED_BYTES:
        for folder in _folders(source):
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    return folder
    return None


def path_hash(path: Path) -> str:
    """A short name for an absolute path."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]


def write_arrays(path: Path, key: Signature, arrays: Arrays) -> None:
    """Write `arrays` and `key` to one file, atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries, offset = [], 0
    for name, array in arrays.items():
        entries.append({"name": name, "dtype": array.dtype.str, "size": array.size, "offset": offset})
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    header = json.dumps({"key": key, "arrays": entries, "bytes": offset}).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGN)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data)
                file.write(b"\0" * (-array.nbytes % _ALIGN))
            file.flush()
            os.fsync(file.fileno())

    replaced(path, write)


def read_arrays(path: Path, key: Signature) -> Arrays | None:
    """The arrays of a file of `write_arrays`, mapped into memory; None when absent, cut short, or of another `key`."""
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            length = int.from_bytes(file.read(8), "little")
            if length > 1 << 20:
                return None
            header = parse_json(file.read(length))
            start = file.tell()
            size = os.fstat(file.fileno()).st_size
            if header["key"] != key or size != start + header["bytes"]:
                return None
        whole = mapped_bytes(path, size)
        arrays = {}
        for part in header["arrays"]:
            dtype = np.dtype(part["dtype"])
            first = start + part["offset"]
            arrays[part["name"]] = np.asarray(whole[first : first + part["size"] * dtype.itemsize]).view(dtype)
        return arrays
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mapped_bytes(path: Path, size: int) -> np.ndarray:
    """The first `size` bytes of a file, at least one, mapped into memory to be read: uint8 [size]. Raises OSError.

    Python's mmap keeps a descriptor for each mapping. Caches have thousands of files, a process often 1,024 descriptors.
    """
    import torch

    try:
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None
    whole.flags.writeable = False
    return whole


def _decompressed(path: Path) -> Path:
    key = json.dumps(signature(path), sort_keys=True).encode()
    prefix = f"{path_hash(path)}-"
    target = cache_dir() / "texts" / f"{prefix}{hashlib.sha256(key).hexdigest()[:16]}-{path.stem}"
    if target.is_file():
        return target
    with locked(target):
        if target.is_file():
            return target

        def write(temporary: Path) -> None:
            with gzip.open(path, "rb") as source, temporary.open("wb") as file:
                while chunk := source.read(1 << 20):
                    try:
                        file.write(chunk)
                    except OSError as error:
                        raise RunError(
                            target, f"cannot be written: {error}", "decompress it yourself, or set LEAD_DS_CACHE"
                        ) from None
                file.flush()
                os.fsync(file.fileno())

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                target.parent, f"cannot be made: {error}", "set LEAD_DS_CACHE to a writable folder"
            ) from None
        replaced(target, write)
        for old in target.parent.glob(f"{prefix}*"):
            if old != target:
                old.unlink(missing_ok=True)
    return target


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name.lstrip('.')}.", suffix=".tmp")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process of this machine at a time; without a usable lock everybody builds, which is only slower."""
    try:
        import fcntl

        folder = cache_dir() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / hashlib.sha256(str(target).encode()).hexdigest()[:16]
        file = lock.open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with told_while_waiting(lambda: f"{holder(lock)}, which makes {target}: end it if it hangs"):
                    fcntl.flock(file, fcntl.LOCK_EX)
        yield
