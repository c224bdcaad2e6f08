"""A served model as a reranker: what it says of candidates, for `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.io.progress import progress
from lead_ds.settings.parse import apply_override, parse_section, refuse_twice
from lead_ds.teachers.served import ServedLookup, ServedSettings
from lead_ds.teachers.served_client import Client

_AT_ONCE = 16  # queries whose candidates are asked for together


def open_served(url: str, settings: Sequence[str]) -> ServedLookup:
    """A served model at an address; settings: `key=value` of a served teacher. Raises InputError for what cannot work."""
    tree: dict[str, Any] = {"kind": "served", "url": url}
    refuse_twice(settings)
    for setting in settings:
        apply_override(tree, setting, ServedSettings)
    lookup = ServedLookup(parse_section(ServedSettings, tree, url))
    Client(lookup.settings).key()
    lookup.answers.begin()
    return lookup


def order(lookup: ServedLookup, dataset: Dataset, candidates: Mapping[str, Mapping[str, float]]) -> Run:
    """The candidates of every query with the served model's scores, or products of its vectors (scale: cosine, cosines)."""
    run: Run = {}
    names = list(candidates)
    with progress("asking", len(names), "queries", shown=True) as meter:
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            queries = dataset.queries.texts(dataset.queries.rows(some))
            listed = [list(candidates[name]) for name in some]
            pairs = [
                (query, text)
                for query, passages in zip(queries, listed, strict=True)
                for text in dataset.corpus.texts(dataset.corpus.rows(passages))
            ]
            scores = iter(_scores(lookup, queries, pairs, [len(passages) for passages in listed]))
            for name, passages in zip(some, listed, strict=True):
                found = {passage: next(scores) for passage in passages}
                run[name] = dict(sorted(found.items(), key=lambda item: -item[1]))
            meter.advance(len(some))
    return run


def _scores(
    lookup: ServedLookup, queries: Sequence[str], pairs: Sequence[tuple[str, str]], counts: Sequence[int]
) -> list[float]:
    questions = lookup.questions(queries, pairs)
    found = lookup.asked(questions)
    answers = np.stack([found[question] for question in questions]).astype(np.float64)
    if not lookup.vectors:
        return answers[:, 0].tolist()
    if lookup.settings.scale == "cosine":
        answers /= np.linalg.norm(answers, axis=1, keepdims=True).clip(1e-12)
    q_CD, p_CD = np.repeat(answers[: len(queries)], counts, axis=0), answers[len(queries) :]
    return (q_CD * p_CD).sum(1).tolist()
