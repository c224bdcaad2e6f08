"""The command before everything else: published files -> the canonical layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def prepare(
    kind: str = typer.Argument(..., help="msmarco-passage, msmarco-doc, trec-dl, beir, ir-datasets or hf."),
    src: str = typer.Argument(..., help="The published folder, archive or file; an id for ir-datasets and hf."),
    out: Path = typer.Argument(..., help="Where corpus.jsonl, queries.jsonl, qrels/ and train.jsonl go."),
    corpus: str | None = typer.Option(
        None, "--corpus", help="trec-dl: the collection, where OUT has none yet; hf: a dataset of the passages."
    ),
    task: str | None = typer.Option(None, "--task", help="trec-dl: passage or document, where SRC has both."),
    subset: str | None = typer.Option(None, "--subset", help="beir: one of several datasets; hf: a configuration."),
    triples: bool = typer.Option(True, help="Read training triples or candidates; else the judgements alone."),
    negatives: int = typer.Option(0, "--negatives", min=0, help="At most so many of each training group; 0: all."),
    drop_missing: bool = typer.Option(False, "--drop-missing", help="Leave out judgements of ids without a text."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Start over in a folder that was prepared before."),
) -> None:
    """Bring published files into the layout that every command reads, and check it. Run it again after a kill to finish.

    lead-ds prepare msmarco-passage downloads data/msmarco

    lead-ds prepare trec-dl downloads data/msmarco

    lead-ds prepare beir scifact.zip data/scifact
    """
    from lead_ds.prepare.build import prepare as run
    from lead_ds.prepare.kinds import open_source

    options: dict[str, Any] = {"triples": triples, "corpus": corpus, "task": task, "subset": subset}
    source = open_source(kind, src, out, **options)
    files, worked = run(source, out, drop_missing=drop_missing, overwrite=overwrite, negatives=negatives)
    if not worked:
        print(f"{out} is complete: nothing to do")
    for name, entry in files.items():
        print(f"{name:<24} {counts(name, entry)}")


def counts(name: str, entry: dict[str, Any]) -> str:
    """What a file holds, in words."""
    unit = {"corpus.jsonl": "passages", "queries.jsonl": "queries", "train.jsonl": "groups"}.get(name, "judgements")
    text = f"{entry['rows']} {unit}"
    if "queries" in entry:
        text += f" of {entry['queries']} queries"
    if "negatives" in entry:
        text += f", {entry['negatives']} negatives"
    return text + (f"; {entry['dropped']} dropped" if entry.get("dropped") else "")


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command()(prepare)
