"""Folders of shards: files that several processes write in turns, each whole or not at all, and that a later call finishes.

A manifest beside them records what they were made of, so that nothing else is added to them. Arrays are kept as
safetensors, which are mapped into memory, with a checksum and the identity of the folder that they belong to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lead_ds.errors import InputError
from lead_ds.io.facts import ANOTHER_FOLDER
from lead_ds.io.json_text import parse_json
from lead_ds.io.mapped import mapped_bytes

Arrays = dict[str, np.ndarray]

MANIFEST = "manifest.json"
# What a folder holds, by the file that says so.
HOLDS = {
    "config.yaml": "a run",
    "index.json": "an index",
    MANIFEST: "vectors, or what a teacher gave",
    "corpus.jsonl": "a collection",
    "config.json": "a model",
    "modules.json": "a model",
}
_KINDS = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "F16": "<f2"}
_DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in _KINDS.items()}
_LARGEST_HEADER = 1 << 20
_MANY = 1000


def refuse_other(folder: Path, own: str, remedy: str = "choose another folder") -> None:
    """Raise InputError where `folder` holds something else than what the file `own` stands for: it would be mixed with that."""
    for name, what in HOLDS.items():
        if name != own and (folder / name).exists():
            raise InputError(folder, f"holds {what} ({name})", remedy)


def refuse_strangers(folder: Path, pattern: str, remedy: str = ANOTHER_FOLDER) -> None:
    """Raise InputError where new shards cannot go to `folder`: a file, another thing's, or with shards of no manifest."""
    if folder.exists() and not folder.is_dir():
        raise InputError(folder, "is a file", "choose a folder with --out")
    refuse_other(folder, MANIFEST)
    if any(folder.glob(pattern)):
        raise InputError(folder, "holds shards without a manifest", remedy)


def check_there(folder: Path, names: Iterable[str], total: int, remedy: str) -> None:
    """Raise InputError where shards of these `total` names are missing.

    A manifest may name any number: no more of them are looked for than there are files, and some.
    """
    there = set(os.listdir(folder))
    lost = list(islice((name for name in names if name not in there), _MANY + 1))
    if lost:
        many = f"{len(lost)}" if len(lost) <= _MANY else f"more than {_MANY}"
        raise InputError(folder, f"{many} of {total} shards are missing, such as {lost[0]}", remedy)


def unfinished(
    paths: Sequence[Path], damaged: Callable[[Path], str | None] = lambda _: None, tell: Callable[[str], None] = print
) -> list[int]:
    """Places of the shards that are not there, or not as they were written. One process calls this for all.

    damaged: what is wrong with a file that is there, if anything.
    """
    todo: list[int] = []
    for shard, path in enumerate(paths):
        problem = damaged(path) if path.exists() else ""
        if problem:
            tell(f"{path.name} is damaged ({problem}): it is made again")
        if problem is not None:
            todo.append(shard)
    return todo


def turns(todo: Sequence[int], rank: int, world: int) -> list[int | None]:
    """The shard of one of `world` processes at each turn that all take together; None where it has none.

    >>> turns([3, 4, 7], rank=1, world=2)
    [4, None]
    """
    mine: list[int | None] = [*todo[rank::world]]
    return mine + [None] * (-(-len(todo) // world) - len(mine))


def save_arrays(path: Path, arrays: Arrays, cache: str) -> None:
    """Write arrays as safetensors, with a checksum of them and the identity of the cache they belong to."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, path, metadata={"cache": cache, "checksum": _checksum(arrays)})


def mapped(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a safetensors file, mapped into memory, and its metadata.

    Raises OSError or ValueError for what is not one, or is cut short.
    """
    try:
        return _mapped(path)
    except (KeyError, IndexError, TypeError, AttributeError):  # a header of another form
        raise ValueError("not a safetensors file") from None


def _mapped(path: Path) -> tuple[Arrays, dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _LARGEST_HEADER:
            raise ValueError("not a safetensors file")
        header = parse_json(file.read(length))
        size = os.fstat(file.fileno()).st_size
    start = 8 + length
    metadata = header.pop("__metadata__", {})
    if size != start + max((part["data_offsets"][1] for part in header.values()), default=0):
        raise ValueError("cut short")
    whole = mapped_bytes(path, size)
    arrays = {}
    for name, part in header.items():
        first, last = part["data_offsets"]
        arrays[name] = np.asarray(whole[start + first : start + last]).view(_DTYPES[part["dtype"]])
        arrays[name] = arrays[name].reshape(part["shape"])
    return arrays, metadata


def damage(path: Path, cache: str) -> str | None:
    """What is wrong with a shard; None where it is as it was written, for this cache."""
    try:
        arrays, metadata = mapped(path)
        if metadata.get("checksum") != _checksum(arrays):
            return "its content changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None if metadata.get("cache") == cache else "it belongs to another cache"


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
