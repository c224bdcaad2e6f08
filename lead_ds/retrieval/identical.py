"""Queries that are passages themselves: ArguAna, Quora and CQADupStack draw their queries from the corpus, ids and all.

Such a query finds itself first. As BEIR does, the passage of the query's own id is left out of its results, unless it is
judged relevant: then the equal ids are chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lead_ds.data.collections.qrels import Run
from lead_ds.data.collections.texts import Texts
from lead_ds.io.notes import say_once

Judged = Mapping[str, Mapping[str, int]]


def with_spare(k: int, query_ids: Iterable[str], passages: Texts | Iterable[str], count: int) -> int:
    """How deep to search for k results of every query: one deeper where a query has the id of one of `count` passages."""
    names = list(query_ids)
    same = (passages.rows(names) >= 0).any() if isinstance(passages, Texts) else not set(names).isdisjoint(passages)
    return min(k + 1, count) if same else k


def without_identical(run: Run, k: int, judged: Judged | None = None, *, quiet: bool = False) -> Run:
    """The k best passages of every query without the one that has the query's id; reported once unless `quiet`."""
    [out] = each_without_identical([run], k, judged, quiet=quiet)
    return out


def each_without_identical(
    runs: Iterable[Run], k: int, judged: Judged | None = None, *, quiet: bool = False
) -> Iterator[Run]:
    """`without_identical`, of one run after the other; reported after the last."""
    dropped = 0
    for run in runs:
        out: Run = {}
        for query, found in run.items():
            if query in found and (judged or {}).get(query, {}).get(query, 0) <= 0:
                found = {passage: score for passage, score in found.items() if passage != query}
                dropped += 1
            best = found.items() if len(found) <= k else sorted(found.items(), key=lambda item: -item[1])[:k]
            out[query] = dict(best)
        yield out
    if dropped and not quiet:
        who = "1 query found itself" if dropped == 1 else f"{dropped} queries found themselves"
        say_once(f"{who}: a passage with the id of its query is left out, as in BEIR (--keep-identical keeps it)")
