"""A teacher's vectors on disk: of every query and passage that training may draw, from chosen layers, each text once.

Any two texts can then be compared, as with the dual encoder itself: a query with every passage of a batch. Beside the manifest
lie an index and shards of consecutive queries or passages, safetensors files that are mapped into memory. Texts alone are
passages, and there are no queries. The index holds

    queries         int64 [G]   of each group, the row of its query
    query_groups    int64 [Q]   of each query, a group that asks it
    passages        int64 [P]   the key of each passage (see Group.keys), ascending
    passage_groups  int64 [P]   of each passage, a group for which it may be drawn

and a shard of S texts, of K chosen layers and the final one, D wide,

    deviation  float16 [S, K + 1, D]    their vectors, less the shard's mean
    mean       float32 [K + 1, D]       that mean

A layer's vectors lie close together: what distinguishes texts is a small part of each, of which float16's 11 bits would
keep little. In the lower layers of BGE-small, vectors stored as they are put relevance wrong by more than its spread;
as deviations, by less than a thousandth of it (benchmarks/throughput.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lead_ds.data.taught.relevance import TeacherCache
from lead_ds.io.shards import Arrays

Kind = Literal["queries", "passages"]
KINDS: tuple[Kind, Kind] = ("queries", "passages")


class VectorCache(TeacherCache):
    """Vectors of all texts of the groups."""

    within_groups = False

    @property
    def layers(self) -> list[int]:
        return list(self.manifest["facts"]["vectors"])

    @property
    def files(self) -> int:
        return 1 + shards(self.manifest)

    @property
    def paths(self) -> Iterator[Path]:
        yield index_path(self.folder)
        for shard in range(shards(self.manifest)):
            yield shard_path(self.folder, *shard_of(self.manifest, shard))

    def held(self) -> str:
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))} and "
        return f"vectors of {layers if self.layers else ''}the final state"

    def said(self, rows: Sequence[int] | np.ndarray, keys: Sequence[np.ndarray]) -> Arrays:
        """queries [K + 1, len(rows), D] and passages [K + 1, len(rows) * N, D], float32. See `TeacherCache`."""
        index = self._index()
        drawn, known = np.concatenate(keys), index["passages"]
        places = np.searchsorted(known, drawn)
        lost = np.flatnonzero(known[np.minimum(places, len(known) - 1)] != drawn)
        if len(lost):
            raise self.lacks(int(rows[int(lost[0]) // len(keys[0])]))
        asked = index["queries"][np.asarray(rows)] if self.manifest["queries"] else np.zeros(0, np.int64)
        return {"queries": self._vectors("queries", asked), "passages": self._vectors("passages", places)}

    def _vectors(self, kind: Kind, rows: np.ndarray) -> np.ndarray:
        """float32 [K + 1, len(rows), D]."""
        shards, places = np.divmod(rows, int(self.manifest["shard_texts"]))
        out = np.empty((len(self.layers) + 1, len(rows), int(self.manifest["width"])), np.float32)
        for shard in np.unique(shards):
            arrays, mine = self._shard(kind, int(shard)), np.flatnonzero(shards == shard)
            out[:, mine] = arrays["deviation"][places[mine]].swapaxes(0, 1) + arrays["mean"][:, None]
        return out

    def _index(self) -> Arrays:
        queries = int(self.manifest["queries"])

        def shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
            rows = arrays["queries"]
            if len(rows) and not 0 <= rows.min() <= rows.max() < queries:
                raise ValueError("queries names rows that no shard has")
            return {"queries": (len(self) if queries else 0,), "passages": (int(self.manifest["passages"]),)}

        return self._open(index_path(self.folder), shapes)

    def _shard(self, kind: Kind, shard: int) -> Arrays:
        size, layers, wide = int(self.manifest["shard_texts"]), len(self.layers) + 1, int(self.manifest["width"])
        texts = min(size, int(self.manifest[kind]) - shard * size)
        shapes = {"deviation": (texts, layers, wide), "mean": (layers, wide)}
        return self._open(shard_path(self.folder, kind, shard), lambda arrays: shapes)


def index_path(folder: Path) -> Path:
    """The file in which texts are looked up."""
    return folder / "index.safetensors"


def shard_path(folder: Path, kind: Kind, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"{kind}-{shard:05d}.safetensors"


def shards(manifest: dict[str, Any]) -> int:
    """How many shards a cache has."""
    return sum(-(-manifest[kind] // manifest["shard_texts"]) for kind in KINDS)


def shard_of(manifest: dict[str, Any], shard: int) -> tuple[Kind, int]:
    """What a shard of a cache holds, and its number among these: those of queries come first."""
    queries = -(-manifest["queries"] // manifest["shard_texts"])
    return ("queries", shard) if shard < queries else ("passages", shard - queries)


class Listing:
    """Of each group the key of its query and those of the passages that may be drawn: 8 bytes for each, however many."""

    def __init__(self, listed: Iterable[tuple[int, np.ndarray]]) -> None:
        asked, counts, keys = array("q"), array("q"), array("q")
        for query, drawn in listed:
            asked.append(query)
            counts.append(len(drawn))
            keys.frombytes(drawn.astype(np.int64).tobytes())
        self.asked, self.counts, self.keys = (np.frombuffer(x, np.int64) for x in (asked, counts, keys))

    def read_by(self, groups: int) -> int:
        """How many passages are read where each shard of `groups` groups reads its own, each once."""
        ends = np.concatenate([[0], np.cumsum(self.counts)])[[*range(0, len(self.counts), groups), len(self.counts)]]
        return sum(len(np.unique(self.keys[first:last])) for first, last in pairwise(ends))

    def index(self, alone: bool = False) -> Arrays:
        """The arrays of an index. alone: of texts alone, which have no queries."""
        none = np.zeros(0, np.int64)
        queries, query_groups = none, none
        if not alone:
            _, query_groups, queries = np.unique(self.asked, return_index=True, return_inverse=True)
        passages, first = np.unique(self.keys, return_index=True)
        owners = np.searchsorted(np.cumsum(self.counts), first, "right")
        found = {"queries": queries, "query_groups": query_groups, "passages": passages, "passage_groups": owners}
        return {name: x.astype(np.int64) for name, x in found.items()}


def vector_arrays(vectors: np.ndarray, dtype: type[np.floating[Any]] = np.float16) -> Arrays:
    """The arrays of a shard of texts' vectors, float32 [S, K + 1, D]. dtype: of the deviations; float32 loses nothing.

    Raises ValueError for what is not a number, or too far from the mean for float16.
    """
    mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
    if not np.isfinite(mean).all():
        raise ValueError("vectors that are not finite numbers")
    with np.errstate(over="ignore"):
        deviation = (vectors - mean).astype(dtype)
    if not np.isfinite(deviation).all():
        raise ValueError(f"vectors with numbers up to {np.abs(vectors).max():.3g}, beyond what float16 holds")
    return {"deviation": deviation, "mean": mean}
