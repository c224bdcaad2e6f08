"""TREC Deep Learning tracks 2019 to 2023 (Craswell et al. 2020): topics and graded judgements over MS MARCO's collections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError
from lead_ds.prepare.beir import TEXTS, canonical_corpus
from lead_ds.prepare.files import File, judgements, list_files, part, tsv_texts
from lead_ds.prepare.manifest import NAME, read_manifest
from lead_ds.prepare.msmarco import open_corpus
from lead_ds.prepare.source import Part, Source, Text, Tick

# NIST's and Microsoft's names, then Anserini's; the groups are the year and, of judgements, passages or documents.
_TOPICS = (r"msmarco-test20(\d\d)-queries\.tsv", r"20(\d\d)_queries\.tsv", r"topics\.dl(\d\d)(?:-\w+)?\.txt")
_QRELS = (r"20(\d\d)\.?qrels[-.](pass|docs)[\w.]*", r"qrels\.dl(\d\d)-(passage|doc)[\w.-]*")
_KINDS = {"passage": "msmarco-passage", "document": "msmarco-doc"}


def open_trec_dl(path: Path, out: Path, corpus: Path | None = None, task: str | None = None) -> Source:
    """The tracks in `path`, as splits dl19, dl20, ...: added to what `out` holds, or over the collection `corpus`.

    `task`: passage or document, where both are judged there. Raises InputError.
    """
    files = list_files(path)
    topics = {year: file for file, (year, *_) in _matching(files, _TOPICS)}
    judged: dict[str, dict[str, File]] = {}
    for file, (year, kind) in _matching(files, _QRELS):
        same = judged.setdefault("passage" if kind.startswith("pass") else "document", {})
        if year in same:
            raise InputError(file, f"judges the same as {same[year].name}", "leave one of them in the folder")
        same[year] = file
    if not judged:
        raise InputError(path, "has no judgements of a TREC DL track", "such as 2019qrels-pass.txt")
    known = _kind_of(out) if corpus is None else None
    task = task or (next(iter(judged)) if len(judged) == 1 else known)
    if task not in judged:
        what = f"has no judgements of the {task} task" if task else "judges passages and documents"
        raise InputError(path, what, "--task passage or --task document")
    absent = [f"20{year}" for year in judged[task] if year not in topics]
    if absent:
        example = "msmarco-test2019-queries.tsv or 2021_queries.tsv"
        raise InputError(path, f"has no topics of {', '.join(absent)}", f"such as {example}")
    years = sorted(judged[task])
    queries = part([topics[year] for year in years], tsv_texts(2, None, "an id and a query"))
    qrels: dict[str, Part[Any]] = {f"dl{year}": part([judged[task][year]], judgements) for year in years}
    texts = None
    if corpus is not None:
        texts = canonical_corpus(corpus) or open_corpus(_KINDS[task], corpus)
    elif not (out / NAME).is_file():
        what = "is not a prepared folder to add the tracks to"
        raise InputError(out, what, "prepare msmarco-passage there first, or name a collection with --corpus")
    return Source(
        "trec-dl",
        f"{path.absolute()} ({task})",
        corpus=texts,
        queries=queries if texts is not None else _after(out, queries),
        qrels=qrels,
    )


def _after(out: Path, topics: Part[Text]) -> Part[Text]:
    """The queries that are there, then the topics."""
    there = out / "queries.jsonl"
    if not there.is_file():
        raise InputError(there, "no such file", f"the prepare of {out} is not finished: run it again first")
    file = File(there, there.stat().st_size)

    def read(tick: Tick) -> Iterator[Text]:
        yield from TEXTS(file, tick)
        yield from topics.read(tick)

    return Part(read, file.size + topics.total, identity=topics.identity)


def _kind_of(out: Path) -> str | None:
    """The task whose collection a prepared folder has; None where nobody knows."""
    if not (out / NAME).is_file():
        return None
    kinds = [source["kind"] for source in read_manifest(out)["sources"]]
    return next((task for task, kind in _KINDS.items() if kind in kinds), None)


def _matching(files: list[File], patterns: tuple[str, ...]) -> list[tuple[File, tuple[str, ...]]]:
    found: dict[str, tuple[File, tuple[str, ...]]] = {}
    for file in files:
        for pattern in patterns:
            match = re.fullmatch(pattern, file.name)
            if match:
                found.setdefault(file.name, (file, match.groups()))
    return list(found.values())
