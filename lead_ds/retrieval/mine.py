"""Hard negatives: passages that a first retriever ranks high for a query and that are no positives of it."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run, read_run
from lead_ds.errors import InputError
from lead_ds.io.files import atomic
from lead_ds.io.owner import owned
from lead_ds.io.progress import progress
from lead_ds.retrieval.encode import Encoding
from lead_ds.retrieval.encoded import AT_ONCE, encode_both
from lead_ds.retrieval.evaluate import ModelLike, open_encoder
from lead_ds.retrieval.identical import with_spare
from lead_ds.retrieval.indexed import check_k
from lead_ds.retrieval.ties import telling_ties
from lead_ds.settings.mining import MineSettings

DEPTH = 200  # candidates of a query, unless more negatives are wanted

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Mined:
    """What mining did: queries written; negatives written; candidates left out, by reason; queries with too few. Also
    queries with a positive whose score is not known, so that margin and ratio do not hold for it, and candidates that became
    positives."""

    queries: int
    negatives: int
    left_out: dict[str, int]
    short: int
    unscored: int
    relabelled: int = 0


def mine(
    source: ModelLike | Mapping[str, Mapping[str, float]],
    dataset: Dataset,
    out: str | Path,
    split: str = "train",
    settings: MineSettings | None = None,
    *,
    batch_size: int = 64,
    quiet: bool = False,
    rescored: Callable[[Run], Run] | None = None,
) -> Mined:
    """Write training groups with hard negatives for a split's judged queries to `out`, as train.jsonl.

    source: a dual encoder (see `ModelLike`), a TREC run (a file or the run itself), or "bm25". Each line:
    {"query_id", "positives", "negatives", "scores"}, the scores being the source's own of the passages it scored.
    rescored: gives the candidates, and positives, the scores by which they are chosen (see `retrieval.rescore`).
    Atomic. Raises InputError when a source, split or id is missing, or settings.depth is more than there are passages.
    """
    settings = settings or MineSettings()
    if settings.depth is not None:
        check_k(settings.depth, len(dataset.corpus), "--depth", dataset.corpus.path)
    depth = settings.depth or max(DEPTH, settings.skip + settings.number)
    keep = settings.keep_identical
    qrels = dataset.qrels(split)
    positives = {query: [name for name, grade in judged.items() if grade > 0] for query, judged in qrels.items()}
    positives = {query: names for query, names in positives.items() if names}
    if not positives:
        raise InputError(split, "no query has a positive", "check the judgements")
    by_score = settings.margin is not None or settings.ratio is not None
    deep = depth if keep else with_spare(depth, positives, dataset.corpus, len(dataset.corpus))
    out = Path(out)
    with owned(out.parent, "another lead-ds mine", record=f".{out.name}.owner.json"):
        runs = _candidates(source, dataset, positives, deep, by_score, batch_size, quiet)
        counts = {"positive": 0, "itself": 0, "rank": 0, "score": 0, "copy": 0}
        negatives = short = unscored = relabelled = 0
        with (
            atomic(out) as temporary,
            temporary.open("w", encoding="utf-8") as file,
            progress("choosing negatives", len(positives), "queries", shown=not quiet) as meter,
        ):
            again = runs if rescored is None else (_again(run, positives, deep, rescored) for run in runs)
            for run in telling_ties(again):
                for query, found in run.items():
                    names = positives[query]
                    if not keep and query in found and query not in names:
                        found = {name: score for name, score in found.items() if name != query}
                        counts["itself"] += 1
                    chosen, more = _choose(query, names, found, qrels[query], dataset, settings, depth, counts)
                    names, relabelled = [*names, *more], relabelled + len(more)
                    scores = {name: found[name] for name in (*names, *chosen) if name in found}
                    group: dict[str, Any] = {"query_id": query, "positives": names, "negatives": chosen}
                    if scores:
                        group["scores"] = scores
                    file.write(json.dumps(group, ensure_ascii=False, allow_nan=False) + "\n")
                    negatives += len(chosen)
                    short += len(chosen) < settings.number
                    unscored += by_score and not found.keys() >= set(names)
                meter.advance(len(run))
        return Mined(len(positives), negatives, counts, short, unscored, relabelled)


def _again(
    run: Run, positives: Mapping[str, Sequence[str]], depth: int, rescored: Callable[[Run], Run]
) -> dict[str, dict[str, float]]:
    """The `depth` best candidates of each query, and its positives, with their new scores."""
    asked = {}
    for query, scores in run.items():
        best = sorted(scores.items(), key=lambda item: -item[1])[:depth]
        asked[query] = dict.fromkeys(positives[query], 0.0) | dict(best)
    found = rescored(asked)
    return {query: dict(found.get(query, {})) for query in run}


def bm25_package() -> Any:
    """The package that computes BM25. Raises InputError without it."""
    try:
        import bm25s
    except ImportError:
        raise InputError("bm25", "the package bm25s is not installed", "pip install bm25s") from None
    return bm25s


def bm25_run(dataset: Dataset, query_ids: Sequence[str], k: int, *, quiet: bool = False) -> Run:
    """The k best passages of every query by BM25. See `bm25_runs`."""
    out: Run = {}
    runs = bm25_runs(dataset, query_ids, k, quiet=quiet)
    with progress("searching by BM25", len(query_ids), "queries", shown=not quiet) as meter:
        for run in runs:
            out |= run
            meter.advance(len(run))
    return out


def bm25_runs(
    dataset: Dataset,
    query_ids: Sequence[str],
    k: int,
    *,
    also: Mapping[str, Sequence[str]] | None = None,
    quiet: bool = False,
) -> Iterator[Run]:
    """The k best passages of every query by BM25 (bm25s: lower case, English stop words), AT_ONCE queries at a time.

    also: passages of a query that are scored whatever their rank. Raises InputError without bm25s.
    """
    bm25s = bm25_package()
    corpus, queries = dataset.corpus, dataset.queries
    shown = not quiet and sys.stderr.isatty()
    retriever = bm25s.BM25()
    words_of_corpus = bm25s.tokenize(corpus.texts(range(len(corpus))), show_progress=shown)
    if not words_of_corpus.vocab:
        raise InputError(corpus.path, "has no word that BM25 could look for", "mine with --model")
    retriever.index(words_of_corpus, show_progress=shown)

    def searched() -> Iterator[Run]:
        for start in range(0, len(query_ids), AT_ONCE):
            some = query_ids[start : start + AT_ONCE]
            tokens = bm25s.tokenize(queries.texts(queries.rows(some)), return_ids=False, show_progress=False)
            rows, scores = retriever.retrieve(tokens, k=min(k, len(corpus)), show_progress=False)
            run = {
                query: {corpus.ids[row]: score for row, score in zip(found, values, strict=True) if score > 0}
                for query, found, values in zip(some, rows.tolist(), scores.tolist(), strict=True)
            }
            for query, words in zip(some, tokens, strict=True):
                missing = [name for name in (also or {}).get(query, ()) if name not in run[query]]
                if missing:
                    scores_P = retriever.get_scores(words) if words else np.zeros(len(corpus))
                    run[query].update(zip(missing, scores_P[corpus.rows(missing)].tolist(), strict=True))
            yield run

    return searched()


def _candidates(
    source: ModelLike | Mapping[str, Mapping[str, float]],
    dataset: Dataset,
    positives: Mapping[str, Sequence[str]],
    depth: int,
    by_score: bool,
    batch_size: int,
    quiet: bool,
) -> Iterator[Run]:
    """The source's candidates of every query, AT_ONCE queries at a time, with its scores of the positives wherever it knows
    them; BM25's cost, and `by_score` asks."""
    if source == "bm25":
        return bm25_runs(dataset, list(positives), depth, also=positives if by_score else None, quiet=quiet)
    if isinstance(source, Mapping):
        return _known(source, positives, dataset, "mine")
    if isinstance(source, str | Path) and Path(source).is_file():
        return _known(read_run(source), positives, dataset, str(source))
    scorer, encoder = open_encoder(source)
    how = Encoding(batch_size, next(scorer.parameters()).device)
    encoded = encode_both(scorer.ranked, encoder, dataset, list(positives), how, quiet=quiet)

    def searched() -> Iterator[Run]:
        done = 0
        for run in encoded.runs(depth):
            # A positive that is not among the candidates still has a score, which the margin needs.
            for place, (query, found) in enumerate(run.items(), done):
                missing = [name for name in positives[query] if name not in found]
                if missing:
                    found.update(zip(missing, encoded.products(place, dataset.corpus.rows(missing)), strict=True))
            done += len(run)
            yield run

    return searched()


def _known(
    run: Mapping[str, Mapping[str, float]], positives: Mapping[str, Sequence[str]], dataset: Dataset, where: str
) -> Iterator[Run]:
    """The queries of a run that is given, AT_ONCE at a time, and those that it lacks."""
    if not set(run) & set(positives):
        raise InputError(where, "the run has none of its queries", "check that run and split belong together")
    queries = list(positives)
    parts = (queries[start : start + AT_ONCE] for start in range(0, len(queries), AT_ONCE))
    return (known_passages({query: dict(run.get(query, {})) for query in part}, dataset, where) for part in parts)


def known_passages(run: Run, dataset: Dataset, where: str) -> Run:
    """`run`, every passage of which the corpus has."""
    for query, found in run.items():
        names = list(found)
        for name, row in zip(names, dataset.corpus.rows(names).tolist(), strict=True):
            if row < 0:
                what = f"passage {name!r} of query {query!r} is not in {dataset.corpus.path.name}"
                raise InputError(where, what, "use a run over this corpus")
    return run


def _choose(
    query: str,
    positives: Sequence[str],
    found: Mapping[str, float],
    judged: Mapping[str, int],
    dataset: Dataset,
    settings: MineSettings,
    depth: int,
    counts: dict[str, int],
) -> tuple[list[str], list[str]]:
    """The query's negatives, hardest first, and what becomes a positive; `counts` grows by what is left out."""
    limit = _limit([found[name] for name in positives if name in found], settings)
    ranked = sorted(found.items(), key=lambda item: -item[1])[:depth]
    kept, relabelled, rank = [], [], 0
    for name, score in ranked:
        if judged.get(name, 0) > 0:
            counts["positive"] += 1
            continue
        rank += 1
        if rank <= settings.skip:
            counts["rank"] += 1
        elif limit is not None and score > limit and settings.relabel:
            relabelled.append(name)
        elif limit is not None and score > limit:
            counts["score"] += 1
        else:
            kept.append(name)
    if settings.sample == "random":
        random.Random(f"mine {settings.seed} {query}").shuffle(kept)
    corpus = dataset.corpus
    asked = None if settings.keep_identical else dataset.queries.text(dataset.queries.row(query)).strip()

    def is_query(row: int) -> bool:
        return asked is not None and asked in (body.strip() for body in (corpus.text(row), corpus.body(row)))

    trusted = [
        name for name, row in zip(relabelled, corpus.rows(relabelled).tolist(), strict=True) if not is_query(row)
    ]
    counts["itself"] += len(relabelled) - len(trusted)
    # A copy of another negative is no use either, but only of a positive does it teach the wrong thing.
    avoided = [_words(text) for text in corpus.texts(corpus.rows(positives))]
    chosen: list[str] = []
    # All rows at once: ids looked up one by one were two thirds of the time.
    wanted = len(kept) if settings.sample == "stratified" else settings.number
    for name, row in zip(kept, corpus.rows(kept).tolist(), strict=True):
        if len(chosen) == wanted:
            break
        if is_query(row):
            counts["itself"] += 1
            continue
        words = _words(corpus.text(row))
        if any(_similarity(words, other) >= settings.similar for other in avoided):
            counts["copy"] += 1
            continue
        chosen.append(name)
    if settings.sample == "stratified":
        chosen = _stratified(chosen, found, settings.number)
    if settings.sample == "random":
        chosen.sort(key=lambda name: -found[name])
    return chosen, trusted


def _stratified(names: Sequence[str], scores: Mapping[str, float], number: int) -> list[str]:
    """Of names in order of score, those nearest to `number` scores spread evenly from the best to the least; each once."""
    if len(names) <= number:
        return list(names)
    left = list(names)
    chosen = []
    for aim in np.linspace(scores[names[0]], scores[names[-1]], number):
        chosen.append(min(left, key=lambda name: abs(scores[name] - aim)))
        left.remove(chosen[-1])
    return sorted(chosen, key=lambda name: -scores[name])


def _limit(positive_scores: Sequence[float], settings: MineSettings) -> float | None:
    """The score above which a candidate is a likely false negative; None where that is not known."""
    if not positive_scores:
        return None
    least = min(positive_scores)
    limits = []
    if settings.margin is not None:
        limits.append(least - settings.margin)
    if settings.ratio is not None:
        limits.append(least - (1 - settings.ratio) * abs(least))  # also for scores below 0
    return min(limits, default=None)


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower()))


def _similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity; 1 for two texts without words."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0
