"""Sparse vectors in memory, and exact search in them: an inverted index is the transpose of its rows (scipy).

scipy is imported where it is used: a run without sparse vectors starts sooner, and transformers' own use of it stays put off.

Q queries, P passages, B texts, V entries of the vocabulary, k results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

QUERY_BLOCK, PASSAGE_BLOCK = 256, 1 << 18  # whose scores are held at once: 256 MB if every query meets every passage


class SparseVectors:
    """Rows of sparse vectors [B, V], float32, on the CPU."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    @classmethod
    def of(cls, batches: Iterable[tuple[Sequence[int], Tensor]], count: int) -> SparseVectors:
        """From (places, vectors [B, V] sparse) of batches that hold every place below `count` once; count: at least 1."""
        from scipy import sparse

        places, parts = list[int](), list[Any]()
        for at, vectors_BV in batches:
            found = vectors_BV.coalesce().cpu()
            index, values = found.indices().numpy(), found.values().float().numpy()
            places += at
            parts.append(sparse.csr_matrix((values, (index[0], index[1])), shape=tuple(found.shape)))
        order = np.empty(count, np.int64)
        order[places] = np.arange(count)
        return cls(sparse.vstack(parts, format="csr")[order])

    @classmethod
    def joined(cls, parts: Sequence[SparseVectors]) -> SparseVectors:
        """The rows of several, in order."""
        from scipy import sparse

        return cls(sparse.vstack([part.rows for part in parts], format="csr"))

    @classmethod
    def read(cls, path: Path) -> SparseVectors:
        """What `write` wrote. Raises what numpy and scipy raise for what is not such a file."""
        from scipy import sparse

        return cls(sparse.load_npz(path).tocsr())

    def write(self, path: Path) -> None:
        """As scipy's .npz, which `scipy.sparse.load_npz` reads."""
        from scipy import sparse

        with path.open("wb") as file:
            sparse.save_npz(file, self.rows, compressed=False)

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __getitem__(self, some: slice) -> SparseVectors:
        return SparseVectors(self.rows[some])

    def postings(self) -> Any:
        """[V, B]: a row for every term."""
        return self.rows.T.tocsr()

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """(first row, postings) of every PASSAGE_BLOCK of them."""
        for start in range(0, len(self), PASSAGE_BLOCK):
            yield start, SparseVectors(self.rows[start : start + PASSAGE_BLOCK]).postings()

    def products(self, at: Sequence[int], other: SparseVectors, row: int) -> list[float]:
        """Inner products of the rows `at` with one row of `other`."""
        return (self.rows[list(at)] @ other.rows[[row]].T).toarray()[:, 0].tolist()


def finite_rows(vectors_BV: Tensor) -> Tensor:
    """[B] bool: whether every number of a vector, dense or sparse, is finite."""
    if not vectors_BV.is_sparse:
        return vectors_BV.isfinite().all(1)
    found = vectors_BV.coalesce()
    finite_B = torch.ones(len(vectors_BV), dtype=torch.bool, device=found.device)
    finite_B[found.indices()[0, ~found.values().isfinite()]] = False
    return finite_B


def sparse_search(queries: SparseVectors, blocks: Iterable[tuple[int, Any]], k: int) -> tuple[Tensor, Tensor]:
    """Scores float32 [Q, k] and rows int64 [Q, k] of the passages with the largest inner products, best first.

    blocks: (first row, postings [V, rows]) of consecutive passages, one at a time in memory. A passage that shares no term
    with a query scores 0, and is not found: its row is -1, as in an inverted index. Fewer than k passages: k is their number.
    """
    parts = [queries.rows[begin : begin + QUERY_BLOCK] for begin in range(0, len(queries), QUERY_BLOCK)]
    best = [list[tuple[Tensor, Tensor]]() for _ in parts]
    for start, postings_VP in blocks:
        for asked, found in zip(parts, best, strict=True):
            scores_QP = torch.from_numpy((asked @ postings_VP).toarray())
            scores_Qk, rows_Qk = scores_QP.topk(min(k, scores_QP.shape[1]), dim=1)
            found[:] = [merge_top_k([*found, (scores_Qk, rows_Qk + start)], k)]
    scores_Qk, rows_Qk = (torch.cat([found[0][which] for found in best]) for which in (0, 1))
    return scores_Qk, rows_Qk.where(scores_Qk > 0, -1)


def merge_top_k(results: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The best k of several results (scores [Q, *], rows [Q, *]) for the same queries; equal scores by row."""
    pairs = list(results)
    scores, rows = torch.cat([s for s, _ in pairs], 1), torch.cat([r for _, r in pairs], 1)
    order = rows.argsort(dim=1)
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), rows.gather(1, order)
