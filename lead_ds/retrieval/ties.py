"""Scores that order nothing: a model that cannot tell passages apart, or is not asked what the texts say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lead_ds.data.collections.qrels import Run
from lead_ds.io.notes import say_once


def telling_ties(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs as they are; after the last, one line where every query gave all its passages one score.

    A query with a single passage says nothing of this, and neither does one query alone.
    """
    seen, tied = 0, True
    for run in runs:
        if tied:
            values = [set(found.values()) for found in run.values() if len(found) > 1]
            seen += len(values)
            tied = all(len(scores) == 1 for scores in values)
        yield run
    if tied and seen > 1:
        say_once(
            f"{seen} queries, and each has one score for all its passages: their order means nothing "
            "(see the model's lengths, prompts and template by lead-ds inspect, and the texts)"
        )
