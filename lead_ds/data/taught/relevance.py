"""A teacher's relevance on disk: of every passage that training may draw for a group, from every layer.

A folder with a manifest (what the teacher was, how it read, of which data) and shards of consecutive groups, one
safetensors file each, mapped into memory. A shard of G groups with C candidates together holds

    starts     int64 [G + 1]         group g's candidates are rows starts[g] to starts[g + 1] - 1 of the next two
    keys       int64 [C]             the passages, ascending within a group; see Group.keys
    deviation  float16 [C, T + 1]    relevance by the T layers and the final one, less its mean over the group
    mean       float32 [G, T + 1]    that mean

Deviations are stored, and not relevance itself, because float16 has 11 bits. What losses compare are the differences
within a group, which are small beside the raw dot products of a wide model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from lead_ds.data.groups.group import Group
from lead_ds.errors import InputError, RunError
from lead_ds.io.facts import digest
from lead_ds.io.json_text import parse_json
from lead_ds.io.shards import MANIFEST, Arrays, check_there, damage, mapped

VERSION = 1
_AGAIN = "run lead-ds teach again"
# What a manifest holds of the sizes of a cache, by what it holds.
_RELEVANCE, _VECTORS = ("shard_groups",), ("shard_texts", "queries", "passages", "width")

C = TypeVar("C", bound="TeacherCache")


class TeacherCache(ABC):
    """A teacher's output for training groups, finished and opened for reading. Picklable: worker processes open it
    again."""

    reads_texts = False
    within_groups: ClassVar[bool]  # whether a query can be compared with its own passages alone

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._mapped: dict[Path, Arrays] = {}

    @classmethod
    def open(cls: type[C], folder: str | Path, *, verify: bool = True) -> C:
        """The cache in `folder`; `verify`: read all of it and compare it with its checksums.

        Raises InputError when there is none, when it is not finished, and naming a shard that is damaged.
        """
        folder = Path(folder).expanduser()
        cache = cls(folder, read_manifest(folder))
        check_there(folder, (path.name for path in cache.paths), cache.files, f"{_AGAIN} to finish it")
        if verify:
            for path in cache.paths:
                problem = damage(path, cache.identity)
                if problem:
                    raise InputError(path, f"is damaged: {problem}", f"{_AGAIN}: it makes this shard again")
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.manifest)

    def __len__(self) -> int:
        """How many groups."""
        return int(self.manifest["facts"]["data"]["groups"])

    @property
    def identity(self) -> str:
        """What ties shards to their manifest."""
        return identity(self.manifest)

    @property
    def num_layers(self) -> int:
        """T: layers of the teacher."""
        return int(self.manifest["layers"])

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """The layers that can be read, ascending."""

    @property
    @abstractmethod
    def files(self) -> int:
        """How many files."""

    @property
    @abstractmethod
    def paths(self) -> Iterator[Path]:
        """Its files."""

    def read(self, rows: Sequence[int] | np.ndarray, groups: Sequence[Group]) -> Arrays:
        """The output for groups that were drawn from `rows`, by name: see `said`."""
        return self.said(rows, [group.keys for group in groups])

    @abstractmethod
    def said(self, rows: Sequence[int] | np.ndarray, keys: Sequence[np.ndarray]) -> Arrays:
        """The output for drawn passages: `keys[i]` [N] of group `rows[i]`, by name.

        Raises InputError for a passage of which nothing is known.
        """

    @abstractmethod
    def held(self) -> str:
        """What it holds, for the user."""

    def lacks(self, row: int) -> InputError:
        """What to raise where a passage that is drawn for a group is not held."""
        what = f"does not hold every passage drawn for group {row}"
        return InputError(self.folder, what, f"{_AGAIN} with this configuration, in a new folder")

    def _open(self, path: Path, shapes: Callable[[Arrays], dict[str, tuple[int, ...]]]) -> Arrays:
        """The arrays of a file. shapes: what they must be. Files are not always compared with their checksums first.

        Raises RunError for a file that cannot be read, or whose arrays are others.
        """
        if path not in self._mapped:
            try:
                arrays = mapped(path)[0]
                wanted = shapes(arrays)
            except (OSError, ValueError) as error:
                raise RunError(path, f"cannot be read: {error}", _AGAIN) from None
            except KeyError as error:
                raise RunError(path, f"is damaged: it lacks {error}", _AGAIN) from None
            odd = [name for name, shape in wanted.items() if name not in arrays or arrays[name].shape != shape]
            if odd:
                raise RunError(path, f"is damaged: {odd[0]} is missing, or of another shape", _AGAIN)
            self._mapped[path] = arrays
        return self._mapped[path]


class RelevanceCache(TeacherCache):
    """The teacher's relevance of each group's own candidates."""

    within_groups = True

    @property
    def layers(self) -> list[int]:
        return list(range(self.num_layers))

    @property
    def shard_groups(self) -> int:
        """Groups of each shard but the last."""
        return int(self.manifest["shard_groups"])

    @property
    def files(self) -> int:
        return -(-int(self.manifest["facts"]["data"]["groups"]) // self.shard_groups)

    @property
    def paths(self) -> Iterator[Path]:
        return (shard_path(self.folder, shard) for shard in range(self.files))

    def held(self) -> str:
        return f"relevance by {self.num_layers} layers and the final state"

    def said(self, rows: Sequence[int] | np.ndarray, keys: Sequence[np.ndarray]) -> Arrays:
        """relevance: float32 [len(rows), N, T + 1]. See `TeacherCache`."""
        return {"relevance": self.relevance(rows, keys)}

    def relevance(self, rows: Sequence[int] | np.ndarray, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Relevance of drawn passages: `keys[i]` [N] of group `rows[i]`. float32 [len(rows), N, T + 1].

        Raises InputError for a passage that is not among the group's candidates.
        """
        out = np.empty((len(rows), len(keys[0]), self.num_layers + 1), np.float32)
        for i, (row, drawn) in enumerate(zip(rows, keys, strict=True)):
            shard, group = divmod(int(row), self.shard_groups)
            arrays = self._shard(shard)
            first, last = arrays["starts"][group : group + 2].tolist()
            candidates = arrays["keys"][first:last]
            places = np.searchsorted(candidates, drawn)
            if places.max(initial=0) >= len(candidates) or (candidates[places] != drawn).any():
                raise self.lacks(int(row))
            out[i] = arrays["deviation"][first + places]
            out[i] += arrays["mean"][group]
        return out

    def _shard(self, shard: int) -> Arrays:
        groups, wide = min(self.shard_groups, len(self) - shard * self.shard_groups), self.num_layers + 1

        def shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
            starts, count = arrays["starts"], len(arrays["keys"])
            if starts.shape != (groups + 1,) or starts[0] or starts[-1] != count or (np.diff(starts) < 0).any():
                raise ValueError("starts is not that of its groups")
            return {"keys": (count,), "deviation": (count, wide), "mean": (groups, wide)}

        return self._open(shard_path(self.folder, shard), shapes)


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"relevance-{shard:05d}.safetensors"


def read_manifest(
    folder: Path, remedy: str = "teacher.path of kind: cached is a folder that lead-ds teach wrote"
) -> dict[str, Any]:
    """The manifest of a cache. Raises InputError when there is none that can be read."""
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text("utf-8"))
        facts = manifest["facts"]
        known = facts["version"] == VERSION
        facts["teacher"]["settings"]
        sizes = {"groups": facts["data"]["groups"], "layers": manifest["layers"]}
        sizes |= {name: manifest[name] for name in (_VECTORS if "vectors" in facts else _RELEVANCE)}
        least = {"queries": 0, "layers": 0}  # texts alone have no queries
        if odd := [name for name, size in sizes.items() if type(size) is not int or size < least.get(name, 1)]:
            raise ValueError(f"{odd[0]} is not a number of them")
        if not all(type(layer) is int for layer in facts.get("vectors", ())):
            raise ValueError("vectors is not a list of layers")
    except FileNotFoundError:
        raise InputError(path, "no such file", remedy) from None
    except KeyError as error:
        raise InputError(path, f"is not that of a teacher's cache: it has no {error}", remedy) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(path, f"cannot be read: {error}", remedy) from None
    if not known:
        raise InputError(path, f"is of version {facts['version']}, this is {VERSION}", "teach into a new folder")
    return manifest


def identity(manifest: dict[str, Any]) -> str:
    """A checksum of what decides a cache's content."""
    sizes = _VECTORS if "vectors" in manifest["facts"] else _RELEVANCE
    decides = {name: manifest[name] for name in ("facts", "layers", *sizes)}
    return digest(decides)


def shard_arrays(keys: Sequence[np.ndarray], relevance: np.ndarray) -> Arrays:
    """The arrays of a shard. `keys`: of each group, in the order of relevance, float32 [C, T + 1].

    Raises ValueError where the relevance is not finite or differs by more within a group than float16 holds.
    """
    starts = np.concatenate([[0], np.cumsum([len(group) for group in keys])]).astype(np.int64)
    mean = np.add.reduceat(relevance, starts[:-1], axis=0, dtype=np.float64) / np.diff(starts)[:, None]
    mean = mean.astype(np.float32)
    if not np.isfinite(mean).all():
        raise ValueError("relevance that is not a finite number")
    with np.errstate(over="ignore"):
        deviation = (relevance - np.repeat(mean, np.diff(starts), axis=0)).astype(np.float16)
    if not np.isfinite(deviation).all():
        largest = float(np.abs(relevance).max())
        raise ValueError(f"relevance up to {largest:.3g}, which differs by more within a group than float16 holds")
    orders = [first + np.argsort(group) for first, group in zip(starts, keys, strict=False)]
    order = np.concatenate(orders)
    return {
        "starts": starts,
        "keys": np.concatenate(keys).astype(np.int64)[order],
        "deviation": deviation[order],
        "mean": mean,
    }
