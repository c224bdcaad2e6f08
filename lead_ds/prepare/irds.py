"""Any dataset that the library `ir_datasets` (MacAvaney et al. 2021) knows by an id."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lead_ds.errors import InputError, RunError
from lead_ds.prepare.source import Judgement, Pairs, Part, Source, Text, Tick

_ROWS = 8192


def library(name: str, extra: str) -> Any:
    """An optional dependency. Raises InputError that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(name, f"cannot be imported: {error}", f"pip install 'lead-ds[{extra}]'") from None


def open_ir_datasets(ids: str, triples: bool = True) -> Source:
    """The datasets of comma-separated ids, which share their documents: `msmarco-passage/train,msmarco-passage/dev/small`.

    The split is what the id adds to that of the documents, with dots; `test` where it adds nothing. `triples`: read
    docpairs. Raises InputError for an id that is unknown or lacks documents or queries.
    """
    ir_datasets = library("ir_datasets", "prepare")
    names = [name.strip() for name in ids.split(",") if name.strip()]
    sets = {name: _load(ir_datasets, name) for name in names}
    if not names:
        raise InputError("SRC", "names no dataset", "such as beir/scifact/test")
    parents = {_parent(ir_datasets, name) for name in names}
    if len(parents) != 1:
        raise InputError(ids, f"have different documents: {', '.join(sorted(parents))}", "prepare them one by one")
    parent = parents.pop()
    splits = {name.removeprefix(parent).strip("/").replace("/", ".") or "test": name for name in names}
    for name, dataset in sets.items():
        for has, what in ((dataset.has_docs(), "documents"), (dataset.has_queries(), "queries")):
            if not has:
                raise InputError(name, f"has no {what}", "see https://ir-datasets.com for what it has")
    identity = {"ids": names, "ir_datasets": ir_datasets.__version__}
    judged: dict[str, Part[Any]] = {
        split: _part([sets[name]], "qrels", _judgements, identity)
        for split, name in splits.items()
        if sets[name].has_qrels()
    }
    paired = [sets[name] for name in names if triples and sets[name].has_docpairs()]
    train = next((split for split in judged if split.startswith("train")), None)
    return Source(
        "ir-datasets",
        ",".join(names),
        corpus=_part([sets[names[0]]], "docs", _documents, identity),
        queries=_part(list(sets.values()), "queries", _queries, identity),
        qrels=judged,
        train=train,
        pairs=_part(paired[:1], "docpairs", _pairs, identity) if paired else None,
        versions={"ir_datasets": ir_datasets.__version__},
    )


def _load(ir_datasets: Any, name: str) -> Any:
    try:
        return ir_datasets.load(name)
    except KeyError:
        near = difflib.get_close_matches(name, list(ir_datasets.registry), 1)
        remedy = f"did you mean {near[0]}?" if near else "see https://ir-datasets.com"
        raise InputError(name, "ir_datasets knows no such id", remedy) from None


def _parent(ir_datasets: Any, name: str) -> str:
    return ir_datasets.docs_parent_id(name)


def _part(sets: list[Any], what: str, read: Callable[[Any], Iterator[Any]], identity: dict[str, Any]) -> Part[Any]:
    def rows(tick: Tick) -> Iterator[Any]:
        for dataset in sets:
            try:
                for row in read(dataset):
                    tick(len(row.queries) if isinstance(row, Pairs) else 1)
                    yield row
            except (OSError, RuntimeError, ValueError) as error:  # a download that fails, or whose hash is wrong
                what_failed = f"ir_datasets cannot read its {what}: {error}"
                raise RunError(dataset.dataset_id(), what_failed, "see the network, or $IR_DATASETS_HOME") from None

    return Part(rows, sum(_count(dataset, what) for dataset in sets), "rows", identity)


def _count(dataset: Any, what: str) -> int:
    try:
        return int(getattr(dataset, f"{what}_count")() or 0)
    except Exception:  # some count by reading what they have not downloaded; a bar may do without
        return 0


def _documents(dataset: Any) -> Iterator[Text]:
    for document in dataset.docs_iter():
        title = getattr(document, "title", None)
        text = getattr(document, "text", None)
        if text is None:
            text = getattr(document, "body", None)
        if not isinstance(title, str) or not isinstance(text, str):
            title, text = "", document.default_text()  # its own fields, in its own order
        yield Text(str(document.doc_id), title, text)


def _queries(dataset: Any) -> Iterator[Text]:
    for query in dataset.queries_iter():
        yield Text(str(query.query_id), "", query.default_text(), dataset.dataset_id())


def _judgements(dataset: Any) -> Iterator[Judgement]:
    where = f"{dataset.dataset_id()} qrels"
    for judged in dataset.qrels_iter():
        yield Judgement(where, str(judged.query_id), str(judged.doc_id), int(judged.relevance))


def _pairs(dataset: Any) -> Iterator[Pairs]:
    pairs = dataset.docpairs_iter()
    while batch := list(islice(pairs, _ROWS)):
        columns = map(list, zip(*((p.query_id, p.doc_id_a, p.doc_id_b) for p in batch), strict=True))
        yield Pairs(f"{dataset.dataset_id()} docpairs", *columns)
