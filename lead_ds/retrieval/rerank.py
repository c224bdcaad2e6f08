"""Rerank: read the passages that a first retriever found with a model of any kind, and order them by its scores.

Dimensions: C candidates (a query with a passage), B texts or pairs of a forward, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run, blank_name, read_run, write_run
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.longest_first import Untokenised, longest_first
from lead_ds.errors import InputError, RunError
from lead_ds.io.files import checksum
from lead_ds.io.progress import progress
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.pairwise import compared, joined, pairs_of, states_of
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.relevance import Scale
from lead_ds.retrieval.evaluate import Task, evaluating
from lead_ds.retrieval.identical import Judged, with_spare, without_identical
from lead_ds.retrieval.metrics import Scores
from lead_ds.retrieval.mine import bm25_run, known_passages
from lead_ds.retrieval.peers import ALONE, Peers, share
from lead_ds.retrieval.ties import telling_ties

T = TypeVar("T")
TextsOf = Callable[[Sequence[int]], list[str]]
"""Rows -> their texts."""

DEPTH = 100  # candidates of a query
SORTED_BATCHES = 256  # texts of so many batches are sorted by length together: little padding, little memory
COMPARED_AT_ONCE = 64  # candidates whose tokens late interaction holds at once


@dataclass(frozen=True)
class Reranker:
    """A model of any kind with its own tokenisation: a dual encoder, a ColBERT, a cross-encoder or a decoder reranker."""

    scorer: Kind
    encoder: TextEncoder

    @classmethod
    def open(
        cls,
        model: str | Path,
        kind: str | None = None,
        settings: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> Reranker:
        """The model of a directory or hub name, in evaluation mode on `device` (default: CUDA where there is one).

        kind: of a teacher's section (None: as its files have it); settings: `key=value` of that section, such as
        max_length=512. Raises InputError as `lead_ds.models.load.load_scorer`.
        """
        from lead_ds.models.load import load_scorer

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        scorer, encoder = load_scorer(str(model), kind, settings, device)
        check_vocabulary(scorer, encoder, str(model))
        return cls(scorer.to(device).eval(), encoder)

    def scores(self, query: str, passages: Sequence[str], batch_size: int = 64) -> list[float]:
        """The relevance of each passage to the query."""
        if not passages:
            return []
        pairs_C2 = np.stack([np.zeros(len(passages), np.int64), np.arange(len(passages))], 1)

        def texts(rows: Sequence[int]) -> list[str]:
            return [passages[row] for row in rows]

        found = score_pairs(self.scorer, self.encoder, lambda rows: [query for _ in rows], texts, pairs_C2, batch_size)
        return found.tolist()


def evaluate_reranked(
    scorer: Kind,
    encoder: TextEncoder,
    task: Task,
    candidates: Mapping[str, Mapping[str, float]],
    *,
    batch_size: int = 64,
    peers: Peers = ALONE,
    quiet: bool = False,
    out: str | Path | None = None,
) -> Scores:
    """Metrics of a task's candidates in the model's order, equal on every process; arguments as `evaluate_model`.

    Every process calls this with the same candidates. A judged query without candidates counts 0. out: a TREC run to write.
    """

    def order(wanted: Mapping[str, Mapping[str, float]]) -> Run:
        return rerank(scorer, encoder, task.dataset, wanted, batch_size=batch_size, peers=peers, quiet=quiet)

    return evaluate_ordered(order, task, candidates, peers=peers, out=out)


def evaluate_ordered(
    order: Callable[[Mapping[str, Mapping[str, float]]], Run],
    task: Task,
    candidates: Mapping[str, Mapping[str, float]],
    *,
    peers: Peers = ALONE,
    out: str | Path | None = None,
) -> Scores:
    """Metrics of a task's candidates as `order` scores them, which gives a run of those that it is given."""
    qrels = task.qrels(out)
    wanted = {query: dict(candidates[query]) for query in qrels if query in candidates}
    if not task.keep_identical:
        wanted = without_identical(wanted, max(map(len, wanted.values()), default=0), qrels, quiet=peers.rank > 0)
    [run] = telling_ties([order(wanted)]) if peers.rank == 0 else [order(wanted)]
    if peers.rank == 0 and out is not None:
        write_run(out, run)
    return peers.from_main(task.scores(run, qrels) if peers.rank == 0 else Scores({}, {}))


def rerank(
    scorer: Kind,
    encoder: TextEncoder,
    dataset: Dataset,
    candidates: Mapping[str, Mapping[str, float]],
    *,
    batch_size: int = 64,
    peers: Peers = ALONE,
    quiet: bool = False,
) -> Run:
    """The candidates of every query with the model's scores, best first, on every process.

    Every process calls this with the same candidates and scores its share of them in evaluation mode. It runs the model
    as often as the others do, so that ZeRO-3 may shard it. candidates: query id -> passage id -> a score, which is not
    read.
    Raises RunError for scores that are not finite.
    """
    names = [(query, passage) for query, found in candidates.items() for passage in found]
    rows = dataset.queries.rows([query for query, _ in names]), dataset.corpus.rows([passage for _, passage in names])
    pairs_C2 = np.stack(rows, 1)
    texts = dataset.queries.texts, dataset.corpus.texts
    with evaluating(scorer):
        scores_C = score_pairs(scorer, encoder, *texts, pairs_C2, batch_size, peers=peers, quiet=quiet)
    run: Run = {query: {} for query in candidates}
    for (query, passage), score in zip(names, scores_C.tolist(), strict=True):
        run[query][passage] = score
    return {query: dict(sorted(found.items(), key=lambda item: -item[1])) for query, found in run.items()}


def find_candidates(
    dataset: Dataset,
    queries: Sequence[str] | Judged,
    depth: int = DEPTH,
    run: str | Path | None = None,
    cache: Path | None = None,
    *,
    quiet: bool = False,
    keep_identical: bool = False,
) -> Run:
    """The `depth` best passages of every query: of a TREC run, or BM25's.

    queries: their ids, or their judgements. keep_identical: false leaves out the passage of a query's own id, unless it is
    judged relevant. cache: a folder in which BM25's are kept, under a name of corpus, queries and depth.
    Raises InputError for a run that cannot be used with the dataset, and without bm25s.
    """
    query_ids, wanted = list(queries), depth
    if not keep_identical:
        depth = with_spare(depth, query_ids, dataset.corpus, len(dataset.corpus))
    found = _candidates(dataset, query_ids, depth, run, cache, quiet)
    if keep_identical:
        return found
    return without_identical(found, wanted, queries if isinstance(queries, Mapping) else None)


def _candidates(
    dataset: Dataset, query_ids: Sequence[str], depth: int, run: str | Path | None, cache: Path | None, quiet: bool
) -> Run:
    if run is not None:
        wanted = set(query_ids)
        found = {query: passages for query, passages in read_run(run).items() if query in wanted}
        if not found:
            raise InputError(run, f"has none of the {len(wanted)} judged queries", "use a run of this split's queries")
        best = {
            name: dict(sorted(passages.items(), key=lambda item: -item[1])[:depth]) for name, passages in found.items()
        }
        return known_passages(best, dataset, str(run))
    if cache is None or blank_name(query_ids) or blank_name(dataset.corpus.ids):
        return bm25_run(dataset, query_ids, depth, quiet=quiet)
    facts = [checksum([dataset.corpus.path, dataset.queries.path]), sorted(query_ids), depth]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=6).hexdigest()
    path = cache / f"candidates-{digest}.trec.gz"
    if path.exists():
        return read_run(path)
    candidates = bm25_run(dataset, query_ids, depth, quiet=quiet)
    write_run(path, candidates, "bm25")
    return candidates


def score_pairs(
    scorer: Kind,
    encoder: TextEncoder,
    queries: TextsOf,
    passages: TextsOf,
    pairs_C2: np.ndarray,
    batch_size: int = 64,
    *,
    peers: Peers = ALONE,
    quiet: bool = True,
) -> np.ndarray:
    """float32 [C]: the score of each pair (row of a query, row of a passage), on every process, which scores its share.

    A cross-encoder or decoder reranker reads pairs; of others, every text is read once. Raises RunError for scores that are
    not finite.
    """
    reader = _Reader(scorer, encoder, batch_size, peers)
    score = _by_pairs if encoder.reads_pairs else _by_texts
    places, scores = score(reader, queries, passages, pairs_C2, peers.rank == 0 and not quiet)
    out_C = np.empty(len(pairs_C2), np.float32)
    for some, values in peers.all((places, scores)):
        out_C[some] = values
    if not np.isfinite(out_C).all():
        bad = np.flatnonzero(~np.isfinite(out_C))
        query, passage = pairs_C2[bad[0]].tolist()
        pair = f"first of query {queries([query])[0][:60]!r} with passage {passages([passage])[0][:60]!r}"
        raise RunError(
            scorer.config.path,
            f"{len(bad)} of {len(out_C)} scores are not finite, {pair}",
            "try dtype=fp32; else a weight of the model is not finite: lead-ds inspect names it",
        )
    return out_C


class _Reader:
    """A model that reads items, every process its own, all equally often."""

    def __init__(self, scorer: Kind, encoder: TextEncoder, batch_size: int, peers: Peers) -> None:
        self.scorer, self.encoder, self.batch_size, self.peers = scorer, encoder, batch_size, peers
        self.device = next(scorer.parameters()).device

    def run(
        self, count: int, read: Callable[[range], list[T]], tokenize: Callable[[list[T]], Tokens], filler: T
    ) -> Iterator[tuple[list[int], Tokens, Tensor]]:
        """(positions below count, their tokens, the model's scores of them), batch after batch.

        read: positions -> items. As many forwards as the process with most items makes: those that it lacks read `filler`.
        """

        def load(places: range) -> Untokenised[T]:
            return Untokenised(read(places), tokenize)

        own, size = -(-count // self.batch_size), self.batch_size
        forwards = max(self.peers.all(own))
        with torch.no_grad():
            for positions, batch in longest_first(count, load, batch_size=size, stretch=size * SORTED_BATCHES):
                moved = self._moved(batch)
                yield positions, moved, self.scorer(tokens=moved)
            for _ in range(forwards - own):
                self.scorer(tokens=self._moved(tokenize([filler])))

    def _moved(self, tokens: Tokens) -> Tokens:
        return {name: x.to(self.device) for name, x in tokens.items()}


def _by_pairs(
    reader: _Reader, queries: TextsOf, passages: TextsOf, pairs_C2: np.ndarray, shown: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Places and scores of this process's share of the pairs, read as pairs."""
    own = share(len(pairs_C2), reader.peers)
    mine_C2 = pairs_C2[own.start : own.stop]

    def read(places: range) -> list[tuple[str, str]]:
        rows = mine_C2[places.start : places.stop]
        return list(zip(queries(rows[:, 0].tolist()), passages(rows[:, 1].tolist()), strict=True))

    def tokenize(texts: list[tuple[str, str]]) -> Tokens:
        return reader.encoder.pairs([query for query, _ in texts], [passage for _, passage in texts])

    scores_C = np.empty(len(own), np.float32)
    with progress("reranking", len(own), "pairs", shown=shown) as meter:
        for places, _, scores_B in reader.run(len(own), read, tokenize, ("a", "a")):
            scores_C[places] = scores_B.float().cpu().numpy()
            meter.advance(len(places))
    return np.arange(own.start, own.stop), scores_C


def _by_texts(
    reader: _Reader, queries: TextsOf, passages: TextsOf, pairs_C2: np.ndarray, shown: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Places and scores of the pairs whose passages fall to this process: vectors of passages are never all kept."""
    rows_P, passage_of_C = np.unique(pairs_C2[:, 1], return_inverse=True)
    own = share(len(rows_P), reader.peers)
    mine_C = np.flatnonzero((passage_of_C >= own.start) & (passage_of_C < own.stop))
    mine_C = mine_C[np.argsort(passage_of_C[mine_C], kind="stable")]
    bounds_P = np.searchsorted(passage_of_C[mine_C], np.arange(own.start, own.stop + 1))
    rows_Q, query_of_C = np.unique(pairs_C2[mine_C, 0], return_inverse=True)
    scores_C = np.empty(len(mine_C), np.float32)
    with progress("reranking", len(rows_Q) + len(own), "texts", shown=shown) as meter:

        def ask(places: range) -> list[str]:
            return queries(rows_Q[places.start : places.stop].tolist())

        def read(places: range) -> list[str]:
            return passages(rows_P[own.start + places.start : own.start + places.stop].tolist())

        def states(count: int, load: Callable[[range], list[str]], tokenize: Any) -> Iterator[Any]:
            for places, tokens, said in reader.run(count, load, tokenize, "a"):
                yield places, tokens, said[None]
                meter.advance(len(places))

        asked = joined(states(len(rows_Q), ask, reader.encoder.queries))
        for places, tokens, said in states(len(own), read, reader.encoder.passages):
            slots_C, in_batch_C = pairs_of(places, np.arange(len(mine_C)), bounds_P)
            found = states_of(tokens, said)
            how = _scale(reader.scorer), COMPARED_AT_ONCE
            for some, relevance in compared(asked, found, query_of_C[slots_C], in_batch_C, *how):
                scores_C[slots_C[some]] = relevance[:, 0].cpu().numpy()
    return mine_C, scores_C


def _scale(scorer: Kind) -> Scale:
    """Cosines where the model's relevance is read by them; z-scores over a query's passages leave their order alone."""
    return "cosine" if scorer.final_scale == "cosine" or scorer.by_cosine else "none"
