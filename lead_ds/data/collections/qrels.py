"""Relevance judgements (BEIR or TREC) and runs (TREC)."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lead_ds.errors import InputError
from lead_ds.io.files import atomic
from lead_ds.io.jsonl import read_lines

Qrels = dict[str, dict[str, int]]
Run = dict[str, dict[str, float]]

_DEEPEST = 1 << 16  # ranks
_HEADER = ("score", "rel", "label", "judg", "grade", "qrel")  # how the last column of a header line begins


def read_judgements(path: str | Path) -> Iterator[tuple[int, str, str, int]]:
    """(line number, query id, passage id, judgement) of a qrels file.

    BEIR: query-id, corpus-id, score with a header line; TREC: query, iteration, passage, judgement. Raises InputError
    naming file and line.
    """
    return parse_judgements(read_lines(path), path)


def parse_judgements(lines: Iterable[tuple[int, str]], where: object) -> Iterator[tuple[int, str, str, int]]:
    """As `read_judgements`, of numbered lines; `where` names their file in an error."""
    for number, line in lines:
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) == 1 or (len(fields) not in (3, 4)):
            fields = line.split()
        try:
            if len(fields) == 3:
                query, passage, score = fields
            else:
                query, _, passage, score = fields
            judgement = _integer(score)
        except ValueError:
            if number == 1 and len(fields) in (3, 4) and fields[-1].strip().lower().startswith(_HEADER):
                continue
            raise InputError(
                f"{where}:{number}",
                f"not a judgement: {line[:80]!r}",
                "query-id, corpus-id, score (BEIR), or query, 0, passage, judgement (TREC); the score is an integer",
            ) from None
        refuse_nul(query + passage, f"{where}:{number}")
        yield number, query.strip(), passage.strip(), judgement


def refuse_nul(names: str, where: object) -> None:
    """Raise InputError for a character that ends a string in C: trec_eval would take two names for one, and abort."""
    if "\0" in names:
        raise InputError(where, f"{names[:80]!r} holds a NUL character", "rename it: trec_eval ends a name there")


def _integer(word: str) -> int:
    """A judgement: an integer of 32 bits, as trec_eval reads them. Raises ValueError, also for 1_0, which int() takes."""
    value = int(word)
    if not -(1 << 31) <= value < 1 << 31 or "_" in word:
        raise ValueError(word)
    return value


def refuse_conflict(path: str | Path, query: str, passage: str) -> NoReturn:
    """Raise InputError naming both lines that judge a pair differently."""
    lines = [(line, grade) for line, *pair, grade in read_judgements(path) if pair == [query, passage]]
    (first, grade), (second, other) = lines[0], next(line for line in lines if line[1] != lines[0][1])
    what = f"passage {passage!r} of query {query!r} is judged {other}, and {grade} on line {first}"
    raise InputError(
        f"{path}:{second}", what, "judge a pair once: which of them holds, training and evaluation cannot know"
    )


def read_qrels(path: str | Path) -> Qrels:
    """query id -> passage id -> judgement. Raises InputError, also when empty, or for a pair with two different judgements."""
    qrels: Qrels = {}
    for _, query, passage, judgement in read_judgements(path):
        if qrels.setdefault(query, {}).setdefault(passage, judgement) != judgement:
            refuse_conflict(path, query, passage)
    if not qrels:
        raise InputError(path, "holds no judgements", "each line is query-id, corpus-id, score")
    return qrels


def read_run(path: str | Path) -> Run:
    """query id -> passage id -> score of a TREC run. Raises InputError naming file and line.

    Scores decide the order, as in trec_eval; ranks are only checked: one that a query has twice means two runs in a
    file.
    """
    run: Run = {}
    # A query's ranks as bits: a set of them takes as much memory as its results. Ranks beyond _DEEPEST, which are rare, in a set.
    ranks: dict[str, int] = {}
    deeper: set[tuple[str, int]] = set()
    for number, line in read_lines(path):
        fields = line.split()
        try:
            query, _, passage, rank, score = fields[:5]
            value, place = float(score.replace("_", "?")), int(rank)
        except ValueError:
            value = math.nan
        if len(fields) != 6 or not math.isfinite(value):
            raise InputError(f"{path}:{number}", f"not a run line: {line[:80]!r}", "query Q0 passage rank score tag")
        refuse_nul(query + passage, f"{path}:{number}")
        ranking = run.setdefault(query, {})
        if passage in ranking:
            raise InputError(f"{path}:{number}", f"{passage!r} is listed twice for query {query!r}", "list it once")
        if 0 <= place < _DEEPEST:
            seen = ranks.get(query, 0)
            twice, ranks[query] = bool(seen >> place & 1), seen | 1 << place
        else:
            twice = (query, place) in deeper
            deeper.add((query, place))
        if twice:
            what = f"rank {place} of query {query!r} is given twice"
            raise InputError(f"{path}:{number}", what, "is it two runs in one file? number each query's results")
        ranking[passage] = value
    if not run:
        raise InputError(path, "holds no results", "each line is query Q0 passage rank score tag")
    return run


def blank_name(names: Iterable[str]) -> str | None:
    """The first of `names` that a run cannot hold: white space ends its fields, NUL a name in C. repr'd; None: there is none."""
    return next((repr(name) for name in names if name.split() != [name] or "\0" in name), None)


def write_run(path: str | Path, run: Mapping[str, Mapping[str, float]], tag: str = "lead-ds") -> None:
    """Write a TREC run whole. See `run_writer`."""
    with run_writer(path, tag) as write:
        write(run)


@contextmanager
def run_writer(path: str | Path, tag: str = "lead-ds") -> Iterator[Callable[[Mapping[str, Mapping[str, float]]], None]]:
    """What writes a TREC run part by part, each query's passages by falling score; gzipped when `path` ends in `.gz`.

    The file has its name when the block ends well, and not before. Raises InputError for an id or a tag that holds white
    space, and for a score that is not finite: nothing is written that `read_run` refuses. Raises RunError when it cannot be
    written.
    """
    path = Path(path)

    def write(run: Mapping[str, Mapping[str, float]]) -> None:
        _refuse_unreadable(path, run, tag)
        for query, ranking in run.items():
            ranked = sorted(ranking.items(), key=lambda item: -item[1])
            lines = (
                f"{query} Q0 {passage} {rank} {float(score)!r} {tag}\n"
                for rank, (passage, score) in enumerate(ranked, 1)
            )
            file.write("".join(lines).encode())

    with atomic(path) as temporary, ExitStack() as opened:
        file: Any = opened.enter_context(temporary.open("wb"))
        if path.suffix == ".gz":
            file = opened.enter_context(gzip.GzipFile(fileobj=file, mode="wb", mtime=0))
        yield write


def _refuse_unreadable(path: Path, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    for query, ranking in run.items():
        if (name := blank_name((tag, query, *ranking))) is not None:
            raise InputError(path, f"{name} holds white space, a NUL, or nothing, which a TREC run cannot", "rename it")
        for passage, score in ranking.items():
            if not math.isfinite(score):
                what = f"the score of passage {passage!r} for query {query!r} is not finite"
                raise InputError(path, what, "see what made it")
