"""MS MARCO passages and documents, versions 1 and 2, from the files as they are published (Bajaj et al. 2016)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError
from lead_ds.prepare.files import File, jsonl_texts, judgements, list_files, part, read_blocks, tsv_texts
from lead_ds.prepare.source import Pairs, Part, Source, Text, Tick

_TAB2 = tsv_texts(2, None, "an id and a text")
_V1_DOCUMENTS = tsv_texts(4, 2, "docid, url, title and body")


@dataclass(frozen=True)
class Names:
    """How a collection's files are called, as regular expressions over names without `.gz`; (1) is the split."""

    corpora: dict[str, Any]  # pattern -> reader
    queries: tuple[str, ...]
    qrels: tuple[str, ...]
    examples: tuple[str, str]  # of a collection, of queries
    triples: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()


NAMES = {
    "msmarco-passage": Names(
        corpora={
            r"collection\.tsv": _TAB2,  # pid, passage
            r"msmarco_passage_\d+(\.jsonl?)?": jsonl_texts("pid", "passage", None),
        },
        queries=(r"queries\.([\w.]+)\.tsv", r"passv2_(\w+)_queries\.tsv", r"topics\.msmarco-passage\.([\w.-]+)\.txt"),
        qrels=(
            r"qrels\.((?:train|dev|eval)[\w.]*)\.tsv",
            r"passv2_(\w+)_qrels\.tsv",
            r"qrels\.msmarco-passage\.([\w.-]+)\.txt",
        ),
        examples=("collection.tsv", "queries.dev.small.tsv"),
        triples=(r"qidpidtriples\.(train)\.full\.2\.tsv", r"qidpidtriples\.(train)\.[\w.]+"),
        candidates=(r"top1000\.(train)(\.tsv|\.txt)?", r"passv2_(train)_top100\.txt"),
    ),
    "msmarco-doc": Names(
        corpora={
            r"msmarco-docs\.tsv": _V1_DOCUMENTS,
            r"msmarco_doc_\d+(\.jsonl?)?": jsonl_texts("docid", "body", "title"),
        },
        queries=(r"msmarco-doc(\w+)-queries\.tsv", r"(docleaderboard)-queries\.tsv", r"docv2_(\w+)_queries\.tsv"),
        qrels=(r"msmarco-doc(\w+)-qrels\.tsv", r"docv2_(\w+)_qrels\.tsv"),
        examples=("msmarco-docs.tsv.gz", "msmarco-docdev-queries.tsv.gz"),
        candidates=(r"msmarco-doc(train)-top100(\.txt)?", r"docv2_(train)_top100\.txt"),
    ),
}
_SPLITS = {"dev-subset": "dev.small"}  # Anserini's name of the same queries
_HUGE = ("triples.train", "top1000.dev", "top1000.eval")  # archives of texts without ids, and of candidates to test on


def open_msmarco(kind: str, path: Path, triples: bool = True) -> Source:
    """The source in `path`: the published folder, or one archive. `triples`: read training triples or candidates.

    Raises InputError when it has no collection, or both versions of it.
    """
    names, files = NAMES[kind], list_files(path, _HUGE)
    queries = [file for file, _ in _matching(files, names.queries)]
    if not queries:
        raise InputError(path, f"has no queries of {kind}", f"such as {names.examples[1]}")
    qrels: dict[str, Part[Any]] = {}
    for file, split in _matching(files, names.qrels):
        qrels.setdefault(split, part([file], judgements))
    pairs: list[tuple[File, str]] = []
    read: Callable[[File, Tick], Iterator[Pairs]] = read_triples
    if triples:
        pairs = _matching(files, names.triples)[:1]
        if not pairs and "train" in qrels:
            pairs, read = _matching(files, names.candidates)[:1], read_candidates
    return Source(
        kind,
        str(path.absolute()),
        corpus=open_corpus(kind, path, files),
        queries=part(queries, _TAB2),
        qrels=dict(sorted(qrels.items(), key=lambda item: _order(item[0]))),
        train="train" if "train" in qrels else None,
        pairs=part([file for file, _ in pairs], read) if pairs else None,
    )


def open_corpus(kind: str, path: Path, files: list[File] | None = None) -> Part[Text]:
    """The collection alone. Raises InputError as `open_msmarco`."""
    files = files or list_files(path, _HUGE)
    found = {pattern: [file for file, _ in _matching(files, (pattern,))] for pattern in NAMES[kind].corpora}
    found = {pattern: shards for pattern, shards in found.items() if shards}
    if not found:
        raise InputError(path, f"has no collection of {kind}", f"such as {NAMES[kind].examples[0]}")
    if len(found) > 1:
        raise InputError(path, f"has two collections of {kind}", "leave one in the folder: their ids differ")
    pattern, shards = next(iter(found.items()))
    return part(shards, NAMES[kind].corpora[pattern])


def read_triples(file: File, tick: Tick) -> Iterator[Pairs]:
    """Query, positive and negative ids, separated by tabs. Raises InputError naming file and line."""
    for first, lines in read_blocks(file, tick):
        rows = [line.split("\t") for line in lines if line]
        if set(map(len, rows)) - {3}:
            _refuse(file, first, lines, 3, "query, positive and negative ids, separated by tabs")
        if rows:
            queries, positives, negatives = map(list, zip(*rows, strict=True))
            yield Pairs(f"{file}:{first}", queries, positives, negatives)


def read_candidates(file: File, tick: Tick) -> Iterator[Pairs]:
    """What a first retriever found: a TREC run, or query id, passage id, query, passage. Raises InputError."""
    for first, lines in read_blocks(file, tick):
        if file.name.startswith("top1000"):
            rows, columns, shape = [line.split("\t") for line in lines if line], 4, "qid, pid, query and passage"
        else:
            rows, columns, shape = [line.split() for line in lines if line], 6, "query Q0 passage rank score tag"
        if set(map(len, rows)) - {columns}:
            _refuse(file, first, lines, columns, shape)
        if rows:
            place = 1 if columns == 4 else 2
            yield Pairs(f"{file}:{first}", [row[0] for row in rows], [], [row[place] for row in rows])


def _refuse(file: File, first: int, lines: list[str], columns: int, shape: str) -> None:
    for number, line in enumerate(lines, first):
        if line and len(line.split("\t") if columns < 6 else line.split()) != columns:
            raise InputError(f"{file}:{number}", f"not a training pair: {line[:80]!r}", shape)


def _matching(files: list[File], patterns: tuple[str, ...]) -> list[tuple[File, str]]:
    """Files and their splits, in the order of splits; of files with the same name the first."""
    found: dict[str, tuple[File, str]] = {}
    for pattern in patterns:
        for file in files:
            match = re.fullmatch(pattern, file.name)
            if match and file.name not in found:
                split = match[1] if match.re.groups else ""
                found[file.name] = file, _SPLITS.get(split, split or "")
    return sorted(found.values(), key=lambda item: (_order(item[1]), item[0].name))


def _order(split: str) -> tuple[int, str]:
    for place, prefix in enumerate(("train", "dev", "eval")):
        if split.startswith(prefix):
            return place, split
    return 3, split
