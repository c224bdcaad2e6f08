"""Metrics of a run against judgements, computed by ir-measures (trec_eval's own code for most of them)."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lead_ds.data.collections.qrels import refuse_nul
from lead_ds.errors import InputError

_AT_ONCE = 1024  # queries that are scored together: the C code takes a copy of their results
EXAMPLES = "for example nDCG@10, RR@10, AP@1000, R@100, P@10"
DEFAULT_DEPTH = 1000  # of a measure without a cutoff, as trec_eval reads runs


@dataclass(frozen=True)
class Scores:
    """mean: measure name -> mean over all judged queries. per_query: measure name -> query id -> value."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]


def score_run(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str],
    relevance_level: int = 1,
) -> Scores:
    """Every measure of `run`, under the names given (nDCG@10, RR@10, AP@1000, R@100, ...).

    nDCG reads graded judgements; the binary measures count judgements >= relevance_level as relevant, unless a name has
    otherwise (`R(rel=2)@100`). As `trec_eval -c`: the mean is over every judged query, one without results counts 0;
    results of queries without judgements do not count. Raises InputError for an unknown measure, empty judgements, and a
    run that shares no query with them.
    """
    import ir_measures

    parsed = {name: parse_measure(name, relevance_level) for name in measures}
    if not parsed:
        raise InputError("measures", "none is named", EXAMPLES)
    if not any(qrels.values()):
        raise InputError("qrels", "no query has a judgement", "check the file")
    if not set(run) & set(qrels):
        raise InputError("run", "has no query that is judged", "check that run and qrels are of the same queries")
    for query in (*qrels, *run):
        refuse_nul(query, "query")
    names = {measure: name for name, measure in parsed.items()}
    per_query: dict[str, dict[str, float]] = {name: {} for name in names.values()}
    try:
        judged = [query for query in qrels if query in run]
        for first in range(0, len(judged), _AT_ONCE):
            some = judged[first : first + _AT_ONCE]
            parts = [_plain({query: of[query] for query in some}, kind) for of, kind in ((qrels, int), (run, float))]
            for metric in ir_measures.iter_calc(list(names), *parts):
                per_query[names[metric.measure]][metric.query_id] = float(metric.value)
    except subprocess.CalledProcessError as error:  # of measures that a program of their own computes
        what = f"{', '.join(parsed)} could not be computed: a program ended with status {error.returncode}"
        raise InputError("measures", what, EXAMPLES) from None
    values = {}
    for name, measure in parsed.items():
        per_query[name] = {query: per_query[names[measure]].get(query, 0.0) for query in qrels}
        values[name] = sum(per_query[name].values()) / len(qrels)
    return Scores(values, per_query)


def parse_measure(name: str, relevance_level: int = 1) -> Any:
    """The measure of that name. Raises InputError for a name that ir-measures does not know or cannot compute here."""
    import ir_measures

    try:
        measure = ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError) as error:
        raise InputError("measure", f"{name!r} is unknown: {error}", EXAMPLES) from None
    cutoff = measure.params.get("cutoff", 1)
    if not isinstance(cutoff, int) or cutoff < 1:
        raise InputError("measure", f"{name!r} reads {cutoff} passages", EXAMPLES)
    if relevance_level != 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
        measure = measure(rel=relevance_level)
    if not any(one.is_available() and one.supports(measure) for one in ir_measures.providers.registry.values()):
        raise InputError("measure", f"{name!r} cannot be computed with the packages installed here", EXAMPLES)
    return measure


def depth(measures: Sequence[str]) -> int:
    """How many passages per query these measures read."""
    return max((int(parse_measure(name).params.get("cutoff", DEFAULT_DEPTH)) for name in measures), default=0)


def _plain(judged: Mapping[str, Mapping[str, Any]], kind: type) -> dict[str, dict[str, Any]]:
    # The C code behind ir-measures takes dict, int and float only, not numpy's or other mappings.
    return {query: {passage: kind(value) for passage, value in row.items()} for query, row in judged.items()}
