"""Exact search: the top k inner products, a block of passages at a time.

Q queries, P passages, D width, k results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lead_ds.retrieval.sparse import SparseVectors, merge_top_k, sparse_search

BLOCK_ELEMENTS = 1 << 26  # scores held at once: 256 MB in float32
QUERY_BLOCK = 4096
DEEP = 256  # results from which selection takes longer than a comparison beforehand
STRETCH = 64  # passages whose best score is compared first
LAST_ROW = 1 << 60  # of no passage: behind every other of the same score


def exact_search(
    queries_QD: Tensor | np.ndarray | SparseVectors,
    passages: Tensor | np.ndarray | Iterable[Tensor | np.ndarray] | SparseVectors,
    k: int,
) -> tuple[Tensor, Tensor]:
    """Scores float32 [Q, k] and rows int64 [Q, k] of the k passages with the largest inner products, best first.

    passages: [P, D], in any float dtype, or consecutive blocks of them, such as memory-mapped shards; only a block is in
    memory. Products run in float32 where the queries are. Fewer than k passages: k is their number.
    """
    if isinstance(queries_QD, SparseVectors) or isinstance(passages, SparseVectors):
        assert isinstance(queries_QD, SparseVectors)
        assert isinstance(passages, SparseVectors)
        return sparse_search(queries_QD, passages.blocks(), k)
    queries_QD = _tensor(queries_QD)
    device = queries_QD.device
    queries = [part.to(device, torch.float32) for part in queries_QD.split(QUERY_BLOCK)]
    best: list[tuple[Tensor, Tensor]] = [_nothing(len(part), device) for part in queries]
    start = 0
    for block in _blocks(passages, min(len(queries_QD), QUERY_BLOCK)):
        block_PD = block.to(device, torch.float32)
        for i, part in enumerate(queries):
            scores, rows = _candidates(part @ block_PD.T, best[i][0], k)
            best[i] = merge_top_k([best[i], (scores, rows + start)], k)
        start += len(block_PD)
    return torch.cat([scores for scores, _ in best]), torch.cat([rows for _, rows in best])


def _candidates(scores_QP: Tensor, best_Qk: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and rows [Q, *] of a block: all that may be among the k best, -inf behind them where a query has fewer.

    Most of a later block is below the k-th best so far. A look at the largest of each stretch finds what is not, in a fraction
    of the time that selection takes.
    """
    if best_Qk.shape[1] == k >= DEEP:
        least_Q1 = best_Qk[:, -1:]
        stretches = pad(scores_QP, (0, -scores_QP.shape[1] % STRETCH), value=-torch.inf).unflatten(1, (-1, STRETCH))
        # Not above, but not below or equal: what is not a number is kept, and refused by whoever reads the scores.
        near = ~(stretches.amax(2) <= least_Q1)
        if int(near.count_nonzero()) <= near.numel() // 2:
            query_n, stretch_n = near.nonzero().unbind(1)
            some = stretches[query_n, stretch_n]
            at_m, place_m = (~(some <= least_Q1[query_n])).nonzero().unbind(1)
            query_m = query_n[at_m]
            counts_Q = torch.bincount(query_m, minlength=len(scores_QP))
            width = int(counts_Q.max())
            if width <= k:
                column_m = torch.arange(len(query_m), device=query_m.device) - (counts_Q.cumsum(0) - counts_Q)[query_m]
                scores = scores_QP.new_full((len(scores_QP), width), -torch.inf)
                rows = query_m.new_full((len(scores_QP), width), LAST_ROW)
                scores[query_m, column_m] = some[at_m, place_m]
                rows[query_m, column_m] = stretch_n[at_m] * STRETCH + place_m
                return scores, rows
    scores, rows = scores_QP.topk(min(k, scores_QP.shape[1]), dim=1)
    return scores, rows


def _nothing(queries: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(queries, 0, device=device), torch.empty(queries, 0, dtype=torch.int64, device=device)


def _blocks(passages: Tensor | np.ndarray | Iterable[Tensor | np.ndarray], queries: int) -> Iterator[Tensor]:
    step = max(1024, BLOCK_ELEMENTS // max(queries, 1))
    wholes = [passages] if isinstance(passages, (Tensor, np.ndarray)) else passages
    for whole in wholes:
        for start in range(0, len(whole), step):
            yield _tensor(whole[start : start + step])


def _tensor(x: Tensor | np.ndarray) -> Tensor:
    if isinstance(x, Tensor):
        return x
    # A copy of the block: memory maps are read-only, which torch does not know.
    return torch.from_numpy(np.array(x))
