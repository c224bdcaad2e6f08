"""BEIR's layout (Thakur et al. 2021), a zip or a folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; gzipped or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds.errors import InputError
from lead_ds.prepare.files import File, jsonl_texts, judgements, list_files, part
from lead_ds.prepare.source import Part, Source, Text

TEXTS = jsonl_texts("_id", "text", "title")


def open_beir(path: Path, subset: str | None = None) -> Source:
    """The dataset in `path`; `subset` names one of several (CQADupStack has twelve). Raises InputError."""
    files = list_files(path)
    folders = {_folder(file): file for file in files if file.name == "corpus.jsonl"}
    if subset is not None:
        folders = {folder: file for folder, file in folders.items() if folder.rsplit("/", 1)[-1] == subset}
    if len(folders) != 1:
        names = ", ".join(sorted(folder.rsplit("/", 1)[-1] for folder in folders))
        what = f"has several datasets: {names}" if folders else f"has no {f'{subset}/' if subset else ''}corpus.jsonl"
        raise InputError(path, what, "--subset NAME chooses one" if folders else "SRC is a BEIR zip or folder")
    folder, corpus = next(iter(folders.items()))
    queries = [file for file in files if file.name == "queries.jsonl" and _folder(file) == folder]
    if not queries:
        raise InputError(path, "has no queries.jsonl beside corpus.jsonl", "was it unpacked whole?")
    found = {
        file.name.removesuffix(".tsv"): part([file], judgements)
        for file in files
        if _folder(file) == f"{folder}/qrels".lstrip("/") and file.name.endswith(".tsv")
    }
    qrels: dict[str, Part[Any]] = {split: found[split] for split in (*_KNOWN, *sorted(found)) if split in found}
    name = str(path.absolute()) + (f" ({subset})" if subset else "")
    return Source(
        "beir",
        name,
        corpus=part([corpus], TEXTS),
        queries=part(queries[:1], TEXTS),
        qrels=qrels,
        train="train" if "train" in qrels else None,
    )


def canonical_corpus(folder: Path) -> Part[Text] | None:
    """The corpus.jsonl of a folder; None where there is none."""
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        path = folder / name
        if path.is_file():
            return part([File(path, path.stat().st_size)], TEXTS)
    return None


_KNOWN = ("train", "dev", "test")


def _folder(file: File) -> str:
    """The folder of a file, inside its archive or on disk."""
    return file.inner.rpartition("/")[0] if file.member is not None else file.path.parent.as_posix()
