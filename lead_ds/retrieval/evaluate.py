"""Evaluate a model on a dataset, or a run against judgements; compare two runs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.collections.dataset import Dataset, check_run_names
from lead_ds.data.collections.qrels import Qrels, Run, read_qrels, read_run, run_writer
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError
from lead_ds.io.notes import say_once
from lead_ds.models.files import RECORD, read_json
from lead_ds.models.kinds.kind import Kind, kinds_that
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.retrieval.encode import Encoding
from lead_ds.retrieval.encoded import Encoded, encode_both
from lead_ds.retrieval.identical import each_without_identical, with_spare
from lead_ds.retrieval.metrics import Scores, depth, parse_measure, score_run
from lead_ds.retrieval.peers import ALONE, Peers
from lead_ds.retrieval.precision import Embed
from lead_ds.retrieval.ties import telling_ties
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.parse import refuse_twice

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
        qrels = self.dataset.qrels(self.split)
        check_relevant(qrels, self.relevance_level, self.split)
        drawn = draw_queries(qrels, self.queries, self.seed)
        texts = self.dataset.queries
        if len(drawn) > 1 and len(set(texts.marks[texts.rows(list(drawn))].tolist())) == 1:
            say_once(f"all {len(drawn)} queries have one text: their rankings are one and the same (see {texts.path})")
        return drawn

    def scores(self, run: Run, qrels: Qrels) -> Scores:
        """The measures of a run. Raises InputError as `score_run`."""
        return score_run(run, qrels, self.measures, self.relevance_level)


def check_relevant(
    qrels: Mapping[str, Mapping[str, int]],
    level: int,
    where: str | Path,
    remedy: str = "lower --relevance-level, or check the judgements",
) -> None:
    """Raise InputError where no judgement is as high as `level`: every measure would be 0, whatever is found."""
    best = max((grade for judged in qrels.values() for grade in judged.values()), default=level)
    if best < level:
        what = f"no judgement is {level} or more, the highest is {best}: every measure would be 0"
        raise InputError(where, what, remedy)


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
        refuse_twice(given)
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
    return measured(encoded, task, qrels, out, quiet=quiet)


def measured(
    encoded: Encoded, task: Task, qrels: Qrels, out: str | Path | None = None, *, quiet: bool = False
) -> Scores:
    """The measures of what a task's queries find, as deep as these look; equal on every process. out: a TREC run to write."""
    deep, corpus, peers = depth(task.measures), task.dataset.corpus, encoded.peers
    if task.keep_identical:
        runs = encoded.runs(deep, quiet=quiet)
    else:
        found = encoded.runs(with_spare(deep, qrels, corpus, len(corpus)), quiet=quiet)
        runs = each_without_identical(found, deep, qrels)
    if peers.rank == 0:
        return peers.from_main(score_each(runs, task, qrels, out))
    for _ in runs:  # what this process finds goes to process 0
        pass
    return peers.from_main(Scores({}, {}))


def score_each(runs: Iterable[Run], task: Task, qrels: Qrels, out: str | Path | None = None) -> Scores:
    """`Task.scores` of the queries of all `runs`, which are every judged one. A run is scored, written to `out`, and let go."""
    per_query: dict[str, dict[str, float]] = {name: {} for name in task.measures}
    with nullcontext() if out is None else run_writer(out) as write:
        for run in telling_ties(runs):
            if write is not None:
                write(run)
            for name, values in task.scores(run, {query: qrels[query] for query in run}).per_query.items():
                per_query[name] |= values
    return Scores({name: sum(values.values()) / len(qrels) for name, values in per_query.items()}, per_query)


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
        scores[dim] = measured(encoded.truncated(dim, unit=scorer.unit or scorer.by_cosine), task, qrels, quiet=quiet)
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
    own: Run = read_run(run) if isinstance(run, (str, Path)) else {query: dict(found) for query, found in run.items()}
    where = qrels if isinstance(qrels, (str, Path)) else "qrels"
    qrels = read_qrels(qrels) if isinstance(qrels, (str, Path)) else qrels
    check_relevant(qrels, relevance_level, where)
    judged = [query for query in own if query in qrels]
    if judged and not keep_identical:
        deepest = max(len(own[query]) for query in judged)
        parts = each_without_identical(({query: own[query]} for query in judged), deepest, qrels)
        for part in parts:  # in its place: a second run of all queries would take gigabytes
            own |= part
    return score_run(own, qrels, measures, relevance_level)


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
