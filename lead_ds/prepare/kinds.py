"""The kinds of source by name, and which options each of them reads."""

from __future__ import annotations

from pathlib import Path

from lead_ds.errors import InputError
from lead_ds.prepare.source import Source

# The options that a kind reads, in addition to those of every kind.
KINDS = {
    "msmarco-passage": {"triples"},
    "msmarco-doc": {"triples"},
    "trec-dl": {"corpus", "task"},
    "beir": {"subset"},
    "ir-datasets": {"triples"},
    "hf": {"corpus", "subset"},
}


def open_source(
    kind: str,
    src: str,
    out: Path,
    *,
    triples: bool = True,
    corpus: str | None = None,
    task: str | None = None,
    subset: str | None = None,
) -> Source:
    """Open `src` as `kind`. Raises InputError for an unknown kind, an option it does not read, or a source it is not."""
    if kind not in KINDS:
        raise InputError("KIND", f"{kind!r} is unknown", f"use {', '.join(KINDS)}")
    given = {"corpus": corpus, "task": task, "subset": subset, "triples": None if triples else "no"}
    for name, value in given.items():
        if value is not None and name not in KINDS[kind]:
            option = "--no-triples" if name == "triples" else f"--{name}"
            readers = ", ".join(other for other, options in KINDS.items() if name in options)
            raise InputError(option, f"is ignored by {kind}", f"it is for {readers}")
    path = Path(src).expanduser()
    if kind.startswith("msmarco"):
        from lead_ds.prepare.msmarco import open_msmarco

        return open_msmarco(kind, path, triples)
    if kind == "trec-dl":
        from lead_ds.prepare.trec_dl import open_trec_dl

        return open_trec_dl(path, out, None if corpus is None else Path(corpus).expanduser(), task)
    if kind == "beir":
        from lead_ds.prepare.beir import open_beir

        return open_beir(path, subset)
    if kind == "ir-datasets":
        from lead_ds.prepare.irds import open_ir_datasets

        return open_ir_datasets(src, triples)
    from lead_ds.prepare.hf import open_hf

    return open_hf(src, corpus, subset)
