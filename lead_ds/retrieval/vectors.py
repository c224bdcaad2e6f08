"""Vectors on disk, as `lead-ds encode` wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.data.collections.texts import Ids, Texts
from lead_ds.errors import InputError
from lead_ds.io.files import check_written, data_checksum, read_json
from lead_ds.io.shards import MANIFEST, check_there
from lead_ds.retrieval.small import SMALL, restored
from lead_ds.retrieval.sparse import SparseVectors

IDS = "ids.txt"
SPARSE = "sparse"
AGAIN = "delete the folder, and run lead-ds encode again"
_MOST = 1 << 62  # vectors, or numbers of one


class Vectors:
    """Vectors on disk: shards [n, D] as .npy files, memory-mapped, with their ids and a manifest of where they came from.

    Sparse ones: as scipy's .npz files, a shard in memory at a time.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Vectors:
        """Finished vectors of `encode_to`. Raises InputError when there are none, or when they are not finished or damaged.

        verify: compare the files with their checksums, which are computed again where a file has changed.
        """
        folder = Path(folder)
        manifest = read_json(folder / MANIFEST, "make it with lead-ds encode")
        check_facts(folder / MANIFEST, manifest, ("count", "shard_rows"), AGAIN)
        vectors = cls(folder, manifest)
        names = (vectors.path(shard).name for shard in range(vectors.shards))
        check_there(folder, names, vectors.shards, "run lead-ds encode again to finish it")
        if not (folder / IDS).is_file():
            raise InputError(folder / IDS, "no such file", AGAIN)
        if vectors.dtype != SPARSE:
            vectors._check_shapes()
        if verify:
            check_written(folder, vectors.names, manifest.get("checksums"), AGAIN)
        return vectors

    def _check_shapes(self) -> None:
        width = -(-self.dimension // 8) if self.dtype.endswith("binary") else self.dimension
        for shard in range(self.shards):
            block = self.block(shard)
            if block.dtype.kind != {"ubinary": "u", "int8": "i", "binary": "i"}.get(self.dtype, "f"):
                raise InputError(self.path(shard), f"holds {block.dtype}, not vectors", AGAIN)
            if block.shape != (len(self.rows(shard)), width):
                raise InputError(self.path(shard), "holds another number of vectors than the manifest gives", AGAIN)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def dimension(self) -> int:
        """D."""
        if self.dtype in (*SMALL, SPARSE):
            return int(self.manifest["dimension"])
        return int(self.block(0).shape[-1]) if self.block(0).ndim else 0

    @property
    def dtype(self) -> str:
        """As what they are stored."""
        return str(self.manifest.get("dtype", "float32"))

    def floats(self, block: np.ndarray) -> np.ndarray:
        """Some of the stored vectors as float32 [n, D] whose inner products rank.

        Quantised ones as what they stand for; all at length 1 where the model that made them compares by cosine.
        """
        if self.dtype not in SMALL:
            floats = np.ascontiguousarray(block, np.float32)
        else:
            ranges = self.manifest.get("ranges")
            ranges = None if ranges is None else np.array(ranges, np.float32)
            floats = restored(block, self.dtype, self.dimension, ranges)
        if self.manifest["model"].get("similarity") != "cosine":
            return floats
        return floats / np.maximum(np.linalg.norm(floats, axis=1, keepdims=True), 1e-12)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of `rows`, as float32 [n, D]."""
        size = int(self.manifest["shard_rows"])
        out = np.empty((len(rows), self.dimension), np.float32)
        for shard in np.unique(rows // size):
            here = np.flatnonzero(rows // size == shard)
            out[here] = self.floats(self.block(int(shard))[rows[here] - shard * size])
        return out

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-int(self.manifest["count"]) // int(self.manifest["shard_rows"]))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"vectors-{shard:05d}.{'npz' if self.dtype == SPARSE else 'npy'}"

    @property
    def names(self) -> list[str]:
        """Its files, but for the manifest."""
        return [IDS, *(self.path(shard).name for shard in range(self.shards))]

    def rows(self, shard: int) -> range:
        """The rows that a shard holds."""
        size = int(self.manifest["shard_rows"])
        return range(shard * size, min((shard + 1) * size, len(self)))

    def blocks(self) -> Iterator[np.ndarray]:
        """Every shard in order, memory-mapped."""
        return (self.block(shard) for shard in range(self.shards))

    def block(self, shard: int) -> np.ndarray:
        """A shard, memory-mapped: [rows, D]. Raises InputError for a file that is not one."""
        try:
            return np.load(self.path(shard), mmap_mode="r")
        except Exception as error:  # numpy parses the header as Python, which can go wrong in as many ways
            reason = str(error).split(". ")[0] or type(error).__name__
            raise InputError(self.path(shard), f"is damaged: {reason}", AGAIN) from None

    def sparse(self, shard: int) -> SparseVectors:
        """A shard of sparse vectors. Raises InputError for a file that is not one, or not of this folder."""
        try:
            found = SparseVectors.read(self.path(shard))
        except Exception as error:  # numpy's and scipy's, of a file that is cut or no archive
            reason = str(error).split(". ")[0] or type(error).__name__
            raise InputError(self.path(shard), f"is damaged: {reason}", AGAIN) from None
        if found.rows.shape != (len(self.rows(shard)), self.dimension):
            raise InputError(self.path(shard), "holds another number of vectors than the manifest gives", AGAIN)
        return found

    def ids(self) -> Sequence[str]:
        """The id of every row, read when it is needed. Raises InputError where there are not as many as vectors."""
        ids = Ids.of_lines(self.folder / IDS, AGAIN)
        if len(ids) != len(self):
            raise InputError(self.folder / IDS, f"holds {len(ids)} ids of {len(self)} vectors", AGAIN)
        return ids


def check_facts(path: Path, facts: dict[str, Any], sizes: Iterable[str], remedy: str) -> None:
    """Raise InputError unless `facts`, read from `path`, are of the kinds that the file of vectors or of an index has."""
    facts = {"checksums": {}, **facts}  # older ones have none
    wrong = [name for name in ("kind", "prompt") if not isinstance(facts.get(name), str)]
    wrong += [name for name in sizes if type(facts.get(name)) is not int or not 0 < facts[name] < _MOST]
    wrong += [name for name in ("model", "checksums") if not isinstance(facts.get(name), dict)]
    if wrong:
        raise InputError(path, f"does not give the {wrong[0]} of vectors", remedy)


def check_texts(facts: dict[str, Any], texts: Texts, where: object) -> None:
    """Raise InputError unless `texts` are those that vectors were made of; facts: their manifest, or an index's."""
    if facts["kind"] == texts.kind and (facts["count"] != len(texts) or facts["data"] != data_checksum(texts.path)):
        what = f"holds vectors of another {texts.path.name} than {texts.path}, or of what it was before"
        raise InputError(where, what, "encode and index it again, or name the dataset it was made of")
