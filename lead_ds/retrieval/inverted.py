"""An inverted index of sparse vectors, on disk: of each shard of passages the postings of every term, mapped when searched.

Postings are the transpose of a shard's rows (scipy). A search multiplies a query's few terms with theirs: of an index larger
than memory, the pages of those terms alone are read. Every shard is written whole or not at all, and kept by a later call.

    starts   int32 [V + 1]   term t's postings are starts[t] to starts[t + 1] - 1 of the next two
    passages int32 [n]       rows of the shard, ascending within a term
    weights  float32 [n]
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from lead_ds.data.collections.texts import Ids
from lead_ds.errors import InputError
from lead_ds.io.facts import digest
from lead_ds.io.files import atomic, check_written, data_checksums, write_json
from lead_ds.io.owner import owned
from lead_ds.io.progress import progress
from lead_ds.io.shards import damage, mapped, refuse_strangers, save_arrays, unfinished
from lead_ds.retrieval.indexed import AGAIN, META, Indexed, check_k, facts_of, is_there
from lead_ds.retrieval.sparse import SparseVectors, sparse_search
from lead_ds.retrieval.vectors import IDS, Vectors

FACTORY = "inverted"


def build_inverted(vectors: Vectors, out: Path, *, quiet: bool, queries: dict[str, Any] | None) -> Path:
    """An inverted index of sparse `vectors` in the folder `out`; a call after a kill finishes it.

    Raises InputError as `build_index`.
    """
    facts = facts_of(vectors, FACTORY, queries)
    owner = digest(facts)
    paths = [_path(out, shard) for shard in range(vectors.shards)]
    with owned(out, "another lead-ds index"):
        if is_there(out, facts):
            return out
        if not (out / IDS).exists():
            refuse_strangers(out, "postings-*.safetensors")
            with atomic(out / IDS) as temporary:
                shutil.copyfile(vectors.folder / IDS, temporary)
        vectors.ids()  # are reported before the work, if they are not as many
        todo = unfinished(paths, lambda path: damage(path, owner))
        total = sum(len(vectors.rows(shard)) for shard in todo)
        with progress(f"indexing {FACTORY}", total, "vectors", shown=not quiet and total > 0) as meter:
            for shard in todo:
                postings = vectors.sparse(shard).postings()
                arrays = {
                    "starts": postings.indptr.astype(np.int32),
                    "passages": postings.indices.astype(np.int32),
                    "weights": postings.data.astype(np.float32),
                }
                with atomic(paths[shard]) as temporary:
                    save_arrays(temporary, arrays, owner)
                meter.advance(len(vectors.rows(shard)))
        sums = data_checksums(out, [IDS, *(path.name for path in paths)])
        write_json(out / META, facts | {"checksums": sums})  # last: its presence is what marks the folder as an index
    return out


class InvertedIndex(Indexed):
    """An index of `build_inverted`, mapped into memory for search."""

    @classmethod
    def of(cls, folder: Path, meta: dict[str, Any], given: dict[str, Any]) -> InvertedIndex:
        """given: settings of `Index.open`. Raises InputError for those that it has not, and for files that are damaged."""
        for name, value in given.items():
            if value:
                raise InputError(folder, f"an inverted index has no {name}", "leave it out")
        ids = Ids.of_lines(folder / IDS, AGAIN)
        shards = -(-int(meta["count"]) // int(meta["shard_rows"]))
        if len(ids) != meta["count"]:
            raise InputError(folder, "its ids and index.json do not belong together", AGAIN)
        paths = [_path(folder, shard) for shard in range(shards)]
        facts = {name: value for name, value in meta.items() if name != "checksums"}
        for path in paths:
            try:
                owner = mapped(path)[1].get("cache")
            except (OSError, ValueError, KeyError) as error:
                raise InputError(path, f"cannot be read: {error}", AGAIN) from None
            if owner != digest(facts):
                raise InputError(path, "does not belong to this index", AGAIN)
        check_written(folder, [IDS, *(path.name for path in paths)], meta.get("checksums"), AGAIN)
        return cls(folder, meta, ids)

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """(first row, postings [V, rows]) of every shard."""
        size, width = int(self.meta["shard_rows"]), int(self.meta["dimension"])
        for first in range(0, len(self), size):
            arrays = mapped(_path(self.folder, first // size))[0]
            postings = sparse.csr_matrix((width, min(size, len(self) - first)), dtype=np.float32)
            # Not by its constructor, which would copy what is mapped.
            postings.data, postings.indices, postings.indptr = (arrays[x] for x in ("weights", "passages", "starts"))
            yield first, postings

    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [Q, k] and rows int64 [Q, k] of SparseVectors, best first; row -1: no further passage has a term."""
        check_k(k, len(self), of=self.folder)
        if k < 1:
            raise InputError("k", f"{k} results cannot be searched for", "use at least 1")
        assert isinstance(queries, SparseVectors)
        scores_Qk, rows_Qk = sparse_search(queries, self.blocks(), k)
        return scores_Qk.numpy(), rows_Qk.numpy()


def _path(folder: Path, shard: int) -> Path:
    return folder / f"postings-{shard:05d}.safetensors"
