"""A dataset in the canonical (BEIR) layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from lead_ds.data.collections.qrels import Qrels, blank_name, read_judgements, read_qrels
from lead_ds.data.collections.texts import Texts
from lead_ds.errors import InputError
from lead_ds.io.jsonl import require_file


class Dataset:
    """A folder of texts and judgements; nothing is read until it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """The dataset in `folder`. Raises InputError when there is no such folder."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "no such folder"
            raise InputError(folder, what, "data.path is a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
        return cls(folder)

    @cached_property
    def corpus(self) -> Texts:
        """The passages. Raises InputError as `Texts.open`."""
        return Texts.open(self.folder / "corpus.jsonl", "corpus")

    @cached_property
    def queries(self) -> Texts:
        """The queries of all splits. Raises InputError as `Texts.open`."""
        return Texts.open(self.folder / "queries.jsonl", "queries")

    @property
    def files(self) -> dict[str, Path]:
        """Where its texts are, by name."""
        return {"corpus": self.corpus.path, "queries": self.queries.path}

    def judgements(self, split: str) -> Path:
        """Where a split's judgements are. Raises InputError, which names the splits, where it has none."""
        has = ", ".join(self.splits)
        remedy = f"splits here: {has}" if has else "add qrels/SPLIT.tsv"
        return require_file(self.folder / "qrels" / f"{split}.tsv", remedy)

    def sample(self, count: int) -> tuple[list[str], list[str]]:
        """At most `count` queries and as many passages, at even distances; none of those that have no file."""
        found: list[list[str]] = []
        for name in ("queries", "corpus"):
            there = any((self.folder / f"{name}.jsonl{suffix}").exists() for suffix in ("", ".gz"))
            texts: Texts | None = getattr(self, name) if there else None
            size = 0 if texts is None else len(texts)
            rows = np.linspace(0, size - 1, min(count, size)).astype(int)
            found.append([] if texts is None else texts.texts(rows))
        return found[0], found[1]

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have judgements."""
        found = [path.name for path in (self.folder / "qrels").glob("*.tsv*")]
        return sorted(
            name.removesuffix(".gz").removesuffix(".tsv") for name in found if name.endswith((".tsv", ".tsv.gz"))
        )

    def qrels(self, split: str) -> Qrels:
        """Judgements of a split. Raises InputError, also for a judged id that has no text."""
        path = self.judgements(split)
        qrels = read_qrels(path)
        passages = list({passage for judged in qrels.values() for passage in judged})
        for texts, names in ((self.queries, list(qrels)), (self.corpus, passages)):
            missing = {name for name, row in zip(names, texts.rows(names).tolist(), strict=True) if row < 0}
            if missing:
                number, name = next(
                    (number, name)
                    for number, query, passage, _ in read_judgements(path)
                    for name in (query, passage)
                    if name in missing
                )
                kind = "query" if texts is self.queries else "passage"
                remedy = f"{len(missing)} such; add it there or take its judgements out"
                raise InputError(f"{path}:{number}", f"{kind} {name!r} is not in {texts.path.name}", remedy)
        return qrels


def check_run_names(dataset: Dataset, out: str | Path, tag: str = "lead-ds") -> None:
    """Raise InputError, before any work, where a run of this dataset could not be read again."""
    if blank_name([tag]):
        raise InputError("--tag", f"{tag!r} holds white space, or nothing", "use one word")
    for texts in (dataset.queries, dataset.corpus):
        if (name := blank_name(texts.ids)) is not None:
            what = f"the id {name} holds white space, a NUL, or nothing, which a TREC run cannot: {out} could not be read again"
            raise InputError(texts.path, what, "rename it, in the judgements too")
