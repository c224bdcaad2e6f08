"""The vectors of a dataset's queries and passages, encoded by every process, and what is found with them.

Q queries, P passages, D width, k results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import RunError
from lead_ds.io.progress import progress
from lead_ds.retrieval.encode import PLAIN, Encoding, encode_share
from lead_ds.retrieval.exact import exact_search, merge_top_k
from lead_ds.retrieval.peers import ALONE, Peers, largest_share, share
from lead_ds.retrieval.precision import Embed
from lead_ds.retrieval.sparse import SparseVectors

AT_ONCE = 1024  # queries whose results are held at once: a thousand passages of each are 150 MB


@dataclass(frozen=True)
class Encoded:
    """Vectors of all queries [Q, D], and of this process's passages [P', D], whose first row is `start`.

    Tensors, or SparseVectors.
    """

    queries: Any
    passages: Any
    start: int
    query_ids: Sequence[str]
    passage_ids: Sequence[str]
    peers: Peers

    def truncated(self, dim: int, *, unit: bool) -> Encoded:
        """The first `dim` dimensions of every vector, at length 1 where `unit`."""
        cut = [x[:, :dim] for x in (self.queries, self.passages)]
        queries_QD, passages_PD = (torch.nn.functional.normalize(x, dim=-1) if unit else x for x in cut)
        return replace(self, queries=queries_QD, passages=passages_PD)

    def runs(self, k: int, *, quiet: bool = True) -> Iterator[Run]:
        """`search`, of some of the queries at a time: what is found for all of them need not fit in memory."""
        shown = self.peers.rank == 0 and not quiet
        with progress("searching", len(self.query_ids), "queries", shown=shown) as meter:
            for start in range(0, len(self.query_ids), AT_ONCE):
                some = slice(start, start + AT_ONCE)
                yield replace(self, queries=self.queries[some], query_ids=self.query_ids[some]).search(k)
                meter.advance(len(self.query_ids[some]))

    def products(self, query: int, rows: np.ndarray) -> list[float]:
        """Inner products of a query with passages of this process, by their rows in the corpus."""
        own = rows - self.start
        if isinstance(self.passages, SparseVectors):
            return self.passages.products(own.tolist(), self.queries, query)
        return (self.passages[torch.from_numpy(own)] @ self.queries[query]).tolist()

    def search(self, k: int) -> Run:
        """The k best passages of every query: query id -> passage id -> score, on process 0; {} elsewhere."""
        if len(self.passages):
            scores_Qk, rows_Qk = exact_search(self.queries, self.passages, k)
        else:  # more processes than passages
            queries = len(self.query_ids)
            scores_Qk, rows_Qk = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64)
        rows_Qk = (rows_Qk + self.start).where(rows_Qk >= 0, -1)  # -1: nothing found
        found = self.peers.all((scores_Qk.cpu().numpy(), rows_Qk.cpu().numpy()))
        if self.peers.rank != 0:
            return {}
        scores_Qk, rows_Qk = merge_top_k([(torch.from_numpy(s), torch.from_numpy(r)) for s, r in found], k)
        return make_run(self.query_ids, scores_Qk.tolist(), rows_Qk.tolist(), self.passage_ids)


def encode_both(
    embed: Embed,
    encoder: TextEncoder,
    dataset: Dataset,
    query_ids: Sequence[str],
    how: Encoding = PLAIN,
    *,
    peers: Peers = ALONE,
    quiet: bool = False,
    documents: tuple[Embed, TextEncoder] | None = None,
) -> Encoded:
    """Vectors of queries and of a dataset's corpus; every process encodes its share. documents: what encodes the corpus, where
    that is another model."""
    corpus, texts = dataset.corpus, dataset.queries
    query_rows = texts.rows(query_ids).tolist()
    own_queries, own_passages = share(len(query_rows), peers), share(len(corpus), peers)
    shown = peers.rank == 0 and not quiet
    with progress("encoding for evaluation", len(own_queries) + len(own_passages), "texts", shown=shown) as meter:
        counts = (len(query_rows), len(corpus)) if peers.world > 1 else (0, 0)
        forwards = [-(-largest_share(count, peers) // how.batch_size) for count in counts]
        rows = [query_rows[i] for i in own_queries]
        queries_QD = encode_share(embed, encoder, "queries", texts.texts, rows, how, forwards=forwards[0], meter=meter)
        reader = documents or (embed, encoder)
        passages_PD = encode_share(
            *reader, "corpus", corpus.texts, own_passages, how, forwards=forwards[1], meter=meter
        )
    if peers.world > 1:
        sent = queries_QD if isinstance(queries_QD, SparseVectors) else queries_QD.cpu().numpy()
        shares: list[Any] = [vectors for vectors in peers.all(sent) if len(vectors)]
        if isinstance(shares[0], SparseVectors):
            queries_QD = SparseVectors.joined(shares)
        else:
            queries_QD = torch.from_numpy(np.concatenate(shares)).to(how.device)
    return Encoded(queries_QD, passages_PD, own_passages.start, query_ids, corpus.ids, peers)


def make_run(
    query_ids: Sequence[str], scores: Sequence[Sequence[float]], rows: Sequence[Sequence[int]], ids: Sequence[str]
) -> Run:
    """query id -> passage id -> score, best first, from search results by row; negative rows (nothing found) left out.

    Raises RunError naming query and passage of a score that is not finite.
    """
    run = {
        query: {ids[row]: score for row, score in zip(found, row_scores, strict=True) if row >= 0}
        for query, found, row_scores in zip(query_ids, rows, scores, strict=True)
    }
    for query, ranking in run.items():
        if not all(map(math.isfinite, ranking.values())):
            passage = next(name for name, score in ranking.items() if not math.isfinite(score))
            what = f"the score of passage {passage!r} for query {query!r} is not finite"
            raise RunError("search", what, "the vectors of either hold numbers that are not, or are too large")
    return run
