"""Evaluate a model on a dataset, or a run against judgements; compare two runs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.collections.dataset import Dataset, check_run_names
from lead_ds.data.collections.qrels import Qrels, Run, read_qrels, read_run, write_run
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError, RunError
from lead_ds.io.notes import say_once
from lead_ds.io.progress import progress
from lead_ds.models.files import RECORD, read_json
from lead_ds.models.kinds.kind import Kind, kinds_that
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.retrieval.encode import PLAIN, Encoding, encode_share
from lead_ds.retrieval.exact import exact_search, merge_top_k
from lead_ds.retrieval.identical import with_spare, without_identical
from lead_ds.retrieval.metrics import Scores, depth, parse_measure, score_run
from lead_ds.retrieval.peers import ALONE, Peers, largest_share, share
from lead_ds.retrieval.precision import Embed
from lead_ds.retrieval.sparse import SparseVectors
from lead_ds.settings.model import ModelConfig

MEASURES = ("RR@10", "nDCG@10", "AP@1000", "R@100", "R@1000")


ModelLike = str | Path | ModelConfig | tuple[Kind, TextEncoder]
"""A dual encoder: its directory or hub name, its configuration, or what `open_encoder` gave."""


@dataclass(frozen=True)
class Task:
    """The judged queries of a dataset's split, and how what is found for them is measured.

    relevance_level: judgements from here on count. queries: at most so many of the split's, drawn by `seed`; 0: all.
    keep_identical: count a passage that has its query's id, which BEIR does not.
    """

    dataset: Dataset
    split: str
    measures: Sequence[str] = MEASURES
    relevance_level: int = 1
    queries: int = 0
    seed: int = 0
    keep_identical: bool = False

    def qrels(self, out: str | Path | None = None) -> Qrels:
        """The judgements of the task's queries, after a look at what could go wrong later; out: a TREC run to be written.

        Raises InputError as `Dataset.qrels`, for an unknown measure, and for ids that a run cannot hold.
        """
        for name in self.measures:
            parse_measure(name, self.relevance_level)
        if out is not None:
            check_run_names(self.dataset, out)
        return draw_queries(self.dataset.qrels(self.split), self.queries, self.seed)

    def scores(self, run: Run, qrels: Qrels) -> Scores:
        """The measures of a run. Raises InputError as `score_run`."""
        return score_run(run, qrels, self.measures, self.relevance_level)


def evaluate_path(
    model: ModelLike,
    data: str | Path,
    split: str = "test",
    measures: Sequence[str] = MEASURES,
    dim: int | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Metrics of a dual encoder in a directory (or as configured) on a split of a dataset, by exact search.

    dim: of its vectors, the first so many dimensions. settings: of `evaluate_model`. Raises InputError for a model, dataset,
    split or measure that is not there.
    """
    scorer, encoder = open_encoder(model, dim=dim)
    return evaluate_model(scorer, encoder, Task(Dataset.open(data), split, measures), **settings).mean


def open_encoder(
    model: ModelLike, device: torch.device | str | None = None, dim: int | None = None, settings: Sequence[str] = ()
) -> tuple[Kind, TextEncoder]:
    """A dual encoder in evaluation mode on `device` (default: CUDA where there is one) with its tokenisation.

    dim: of its vectors, the first so many dimensions. settings: `key=value` of a model in a directory, as
    `lead_ds.models.load.load_scorer` takes them, which see for its errors.
    """
    from lead_ds.models.load import load_encoder, load_student, load_text

    if isinstance(model, tuple):
        return model
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(model, ModelConfig):
        if getattr(model, "width", None) is not None:
            raise InputError("student.width", "cuts a student when its training starts", "name what was trained")
        scorer, encoder = dual_encoder(load_student(model, torch.float32)), load_text(model)
    else:
        given = [*settings, *([] if dim is None else [f"dim={dim}"])]
        scorer, encoder = load_encoder(str(model), given, device)
        trained, dim = read_json(str(model), RECORD).get("dims"), scorer.dim
        if dim is not None and trained and dim not in trained:
            say_once(f"{model} was trained at {', '.join(map(str, trained))} dimensions, not at {dim}")
    check_vocabulary(scorer, encoder, scorer.config.path)
    return scorer.to(device).eval(), encoder


def dual_encoder(scorer: Kind) -> Kind:
    """The scorer, if it gives a vector per text. Raises InputError for any other kind."""
    if not scorer.gives_vectors:
        raise InputError(
            scorer.config.path, f"is a {scorer.name}", f"encoding and exact search need a {kinds_that('gives_vectors')}"
        )
    return scorer


def evaluate_model(
    scorer: Kind,
    encoder: TextEncoder,
    task: Task,
    *,
    batch_size: int = 64,
    embed: Embed | None = None,
    peers: Peers = ALONE,
    quiet: bool = False,
    out: str | Path | None = None,
) -> Scores:
    """Exact search of a task's queries over the whole corpus, and its metrics, equal on every process.

    Every process calls this, encodes its share of the corpus and searches in it; only the best results travel.
    embed: how the model is run, where it is wrapped by an engine. out: a TREC run to write. The model is in evaluation mode
    meanwhile. Raises InputError as `Task.qrels` and `Task.scores`.
    """
    scorer, qrels = dual_encoder(scorer), task.qrels(out)
    how = Encoding(batch_size, next(scorer.parameters()).device)

    def read(tokens: Tokens) -> Tensor:
        return scorer.comparable((embed or scorer.embed)(tokens))

    with evaluating(scorer):
        encoded = encode_both(read, encoder, task.dataset, list(qrels), how, peers=peers, quiet=quiet)
    run = find(encoded, task, qrels)
    if peers.rank == 0 and out is not None:
        write_run(out, run)
    return peers.from_main(task.scores(run, qrels) if peers.rank == 0 else Scores({}, {}))


def evaluate_widths(
    scorer: Kind,
    encoder: TextEncoder,
    task: Task,
    dims: Sequence[int],
    *,
    batch_size: int = 64,
    peers: Peers = ALONE,
    quiet: bool = False,
) -> dict[int, Scores]:
    """As `evaluate_model`, by the first dimensions of its vectors alone: each of `dims`. Every text is encoded once."""
    scorer, qrels = dual_encoder(scorer), task.qrels()
    how = Encoding(batch_size, next(scorer.parameters()).device)
    with evaluating(scorer):
        encoded = encode_both(scorer.ranked, encoder, task.dataset, list(qrels), how, peers=peers, quiet=quiet)
    scores: dict[int, Scores] = {}
    for dim in dims:
        run = find(encoded.truncated(dim, unit=scorer.unit or scorer.by_cosine), task, qrels)
        scores[dim] = peers.from_main(task.scores(run, qrels) if peers.rank == 0 else Scores({}, {}))
    return scores


@contextmanager
def evaluating(scorer: Kind) -> Iterator[None]:
    """A model in evaluation mode, and then as it was."""
    training = scorer.training
    scorer.eval()
    try:
        yield
    finally:
        scorer.train(training)


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


def find(encoded: Encoded, task: Task, qrels: Qrels) -> Run:
    """What is found for a task's queries, as deep as its measures look."""
    deep, corpus = depth(task.measures), task.dataset.corpus
    if task.keep_identical:
        return encoded.search(deep)
    return without_identical(encoded.search(with_spare(deep, qrels, corpus, len(corpus))), deep, qrels)


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


def draw_queries(qrels: Qrels, count: int, seed: int) -> Qrels:
    """Judgements of at most `count` queries, drawn by `seed`; all of them for 0."""
    if count == 0 or count >= len(qrels):
        return qrels
    chosen = set(random.Random(f"evaluation {seed}").sample(sorted(qrels), count))
    return {query: judged for query, judged in qrels.items() if query in chosen}


def evaluate_run(
    run: str | Path | Mapping[str, Mapping[str, float]],
    qrels: str | Path | Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = MEASURES,
    relevance_level: int = 1,
    *,
    keep_identical: bool = False,
) -> Scores:
    """Metrics of a TREC run, as `score_run`; files are read. Raises InputError for files that cannot be used.

    keep_identical: count a passage that has its query's id, as trec_eval does and BEIR does not.
    """
    run = read_run(run) if isinstance(run, (str, Path)) else run
    qrels = read_qrels(qrels) if isinstance(qrels, (str, Path)) else qrels
    if not keep_identical:
        kept = {query: dict(found) for query, found in run.items() if query in qrels}
        run = without_identical(kept, max(map(len, kept.values()), default=0), qrels) if kept else run
    return score_run(run, qrels, measures, relevance_level)


@dataclass(frozen=True)
class Comparison:
    """Two systems on one measure: their means, the difference b - a, and the two-sided p value of a paired test.

    low, high: the 95% interval of the difference, by the percentile bootstrap over queries.
    """

    measure: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    queries: int
    test: str


def compare(a: Scores, b: Scores, measure: str, *, samples: int = 100_000, seed: int = 0) -> Comparison:
    """Whether two systems differ on a measure, by the paired randomisation test over queries.

    Under the null hypothesis the sign of each query's difference is arbitrary. The p value is the share of random sign
    flips whose mean is at least as far from 0 as the one seen. All 2^n flips are used where these are fewer than
    `samples` (Smucker, Allan, Carterette, CIKM 2007). Raises InputError when the runs were scored on other queries.
    """
    values = [scores.per_query[measure] for scores in (a, b)]
    if set(values[0]) != set(values[1]):
        raise InputError("compare", "the two runs were scored on different queries", "use the same judgements")
    queries = sorted(values[0])
    differences = np.array([values[1][query] - values[0][query] for query in queries])
    seen = abs(differences.sum())
    moving = differences[differences != 0]  # a query without a difference has no sign to flip
    exhaustive = 2 ** len(moving) <= samples
    count = 2 ** len(moving) if exhaustive else samples
    generator, extreme = np.random.default_rng(seed), 0
    for start in range(0, count, 4096):
        size = min(4096, count - start)
        if exhaustive:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(len(moving))) & 1
        else:
            bits = generator.integers(0, 2, (size, len(moving)))
        sums = np.abs((2 * bits - 1) @ moving)
        extreme += int((sums >= seen - 1e-12).sum())
    # The identity is one of the possible flips: a sampled p value is never 0.
    p_value = extreme / count if exhaustive else (extreme + 1) / (count + 1)
    test = "two-sided paired randomisation, " + ("all" if exhaustive else f"{count}") + " sign flips"
    means = a.mean[measure], b.mean[measure]
    return Comparison(measure, *means, means[1] - means[0], *_interval(differences, seed), p_value, len(queries), test)


def compare_runs(
    a: str | Path | Mapping[str, Mapping[str, float]],
    b: str | Path | Mapping[str, Mapping[str, float]],
    qrels: str | Path | Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = MEASURES,
    relevance_level: int = 1,
    *,
    keep_identical: bool = False,
) -> list[Comparison]:
    """`compare` of two TREC runs on every measure. Raises InputError as `evaluate_run`."""
    qrels = read_qrels(qrels) if isinstance(qrels, (str, Path)) else qrels
    level, keep = relevance_level, keep_identical
    scores_a, scores_b = (evaluate_run(run, qrels, measures, level, keep_identical=keep) for run in (a, b))
    return [compare(scores_a, scores_b, measure) for measure in scores_a.mean]


def _interval(differences: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean."""
    generator = np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(differences))  # resamples drawn at once
    draws = [min(block, resamples - start) for start in range(0, resamples, block)]
    shapes = [(count, len(differences)) for count in draws]
    means = np.concatenate([differences[generator.integers(0, len(differences), shape)].mean(1) for shape in shapes])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
