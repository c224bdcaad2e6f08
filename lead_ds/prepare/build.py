"""Write a source's files into the canonical layout, each checked, each once: `prepare` can be killed and run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.data.collections.qrels import read_judgements
from lead_ds.data.collections.texts import Texts
from lead_ds.errors import InputError
from lead_ds.io.jsonl import dumps
from lead_ds.io.progress import progress
from lead_ds.prepare.grouping import Grouper
from lead_ds.prepare.manifest import Manifest, Output, open_manifest, parts_folder
from lead_ds.prepare.source import Judgement, Part, Source, Text, Tick

_ROWS = 8192  # rows that are written, or looked up, together
_NAMED = 3  # missing ids that an error names


class Builder:
    """The files of one source in one folder."""

    def __init__(self, source: Source, manifest: Manifest, drop_missing: bool, negatives: int, shown: bool) -> None:
        self._source, self._manifest, self._folder = source, manifest, manifest.folder
        self._drop, self._negatives, self._shown = drop_missing, negatives, shown
        self._queries: Texts | None = None
        self._corpus: Texts | None = None

    def steps(self) -> dict[str, Callable[[Output], None]]:
        """The files to write, in their order."""
        source = self._source
        steps: dict[str, Callable[[Output], None]] = {"queries.jsonl": self._write_queries}
        if source.corpus is not None:
            steps["corpus.jsonl"] = self._write_corpus
        for split, part in source.qrels.items():
            steps[f"qrels/{split}.tsv"] = lambda output, part=part: self._write_qrels(part, output)  # type: ignore[misc]
        if source.groups is not None:
            steps["train.jsonl"] = self._write_groups
        elif source.train is not None or source.pairs is not None:
            steps["train.jsonl"] = self._write_train
        return steps

    @property
    def queries(self) -> Texts:
        """The queries that were written."""
        self._queries = self._queries or Texts.open(self._folder / "queries.jsonl", "queries")
        return self._queries

    @property
    def corpus(self) -> Texts:
        """The passages that were written, or were there before."""
        self._corpus = self._corpus or Texts.open(self._folder / "corpus.jsonl", "corpus")
        return self._corpus

    def key(self, name: str) -> str:
        """A hash of what a file is made from: judgements and training groups also of the texts they name."""
        source = self._source
        parts: list[Any] = [source.kind, source.name]
        if name == "corpus.jsonl":
            parts.append(_identity(source.corpus))
        else:
            parts.append(_identity(source.queries))
        if name.startswith("qrels/"):
            parts.append(_identity(source.qrels[name.removeprefix("qrels/").removesuffix(".tsv")]))
        if name == "train.jsonl":
            parts += [
                _identity(source.qrels.get(source.train or "")),
                _identity(source.pairs),
                _identity(source.groups),
            ]
            parts.append(self._negatives)
        if name.startswith(("qrels/", "train")):
            corpus = self._manifest.files.get("corpus.jsonl", {}).get("checksum")
            parts.append(_identity(source.corpus) or corpus)
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def stale(self, name: str, key: str) -> bool:
        """Whether a file must be written. Raises InputError for one that is not as it was left, which may be somebody's work."""
        manifest = self._manifest
        entry = manifest.files.get(name)
        if entry is None or not (self._folder / name).is_file():
            return True
        holds = manifest.holds(name)
        if manifest.complete and not holds:
            remedy = "move it away, or --overwrite to prepare everything again"
            raise InputError(self._folder / name, "was changed since it was prepared", remedy)
        if key not in entry["keys"] and manifest.shared:
            if self._source.corpus is not None:
                what = f"must be written again, and others were added to {self._folder}"
                raise InputError(self._folder / name, what, "--overwrite, then prepare those again")
            if name != "queries.jsonl" and not manifest.complete:
                remedy = "give a folder that does not have it"
                raise InputError(self._folder / name, "is already here, from another source", remedy)
        return not holds or key not in entry["keys"] or bool(entry.get("dropped") and not self._drop)

    def check(self, name: str) -> None:
        """Read what was written as everything else will: a repeated id ends here. Raises InputError."""
        if name in ("queries.jsonl", "corpus.jsonl"):
            try:
                _ = self.queries if name == "queries.jsonl" else self.corpus
            except InputError:
                self._manifest.forget(name)
                raise

    @contextmanager
    def _reading(self, what: str, part: Part[Any]) -> Iterator[Tick]:
        """Count what is read of `part` on a progress bar, bytes as MB."""
        scale, unit = (1_000_000, "MB") if part.unit == "bytes" else (1, "rows")
        done = 0
        with progress(what, -(-part.total // scale), unit, shown=self._shown) as meter:

            def tick(count: int) -> None:
                nonlocal done
                done += count
                if done // scale > meter.done:
                    meter.advance(done // scale - meter.done)

            yield tick

    def _write_corpus(self, output: Output) -> None:
        assert self._source.corpus is not None
        rows = 0
        with self._reading("corpus.jsonl", self._source.corpus) as tick:
            texts = self._source.corpus.read(tick)
            while batch := list(islice(texts, _ROWS)):
                for text in batch:
                    _refuse_id(text, self._source.name)
                output.write(b"".join([dumps({"_id": t.id, "title": t.title, "text": t.text}) + b"\n" for t in batch]))
                rows += len(batch)
        output.facts = {"rows": rows}

    def _write_queries(self, output: Output) -> None:
        """All splits' queries, each once; the same id with another text is an error."""
        known: dict[str, int] = {}
        with self._reading("queries.jsonl", self._source.queries) as tick:
            for query in self._source.queries.read(tick):
                _refuse_id(query, self._source.name)
                content = hash(" ".join(query.text.lower().split()))  # official files differ in case and blanks
                if known.setdefault(query.id, content) == content:
                    if len(known) > output.facts.get("rows", 0):
                        output.facts["rows"] = len(known)
                        output.write(dumps({"_id": query.id, "text": query.text}) + b"\n")
                else:
                    what = f"query {query.id!r} has another text than before: {query.text[:80]!r}"
                    raise InputError(query.where or self._source.name, what, "ids must be unique")

    def _write_qrels(self, part: Part[Judgement], output: Output) -> None:
        output.write(b"query-id\tcorpus-id\tscore\n")
        judged: set[str] = set()
        rows, dropped = 0, 0
        missing: dict[str, dict[str, str]] = {"query": {}, "passage": {}}
        with self._reading("judgements", part) as tick:
            stream = part.read(tick)
            while batch := list(islice(stream, _ROWS)):
                here = self._missing(batch, missing)
                kept = [judgement for judgement, absent in zip(batch, here.tolist(), strict=True) if not absent]
                dropped += len(batch) - len(kept)
                rows += len(kept)
                judged.update(judgement.query for judgement in kept)
                output.write("".join([f"{j.query}\t{j.passage}\t{j.score}\n" for j in kept]).encode())
        if dropped and not self._drop:
            raise _unknown(missing, dropped)
        if not rows:
            raise InputError(
                self._source.name, "a split holds no judgements", "each line is query-id, corpus-id, score"
            )
        output.facts = {"rows": rows, "queries": len(judged), "dropped": dropped}

    def _missing(self, batch: list[Judgement], missing: dict[str, dict[str, str]]) -> np.ndarray:
        """Which judgements name an id that has no text; `missing` collects id -> the line that names it. bool [n]."""
        absent = np.zeros(len(batch), bool)
        for kind, texts, names in (
            ("query", self.queries, [judgement.query for judgement in batch]),
            ("passage", self.corpus, [judgement.passage for judgement in batch]),
        ):
            here = texts.rows(names) < 0
            for row in np.flatnonzero(here).tolist():
                missing[kind].setdefault(names[row], batch[row].where)
            absent |= here
        return absent

    def _write_groups(self, output: Output) -> None:
        """Groups as the source has them; negatives are at most so many."""
        assert self._source.groups is not None
        rows, dropped, count = 0, 0, 0
        missing: dict[str, dict[str, str]] = {"query": {}, "passage": {}}
        with self._reading("train.jsonl", self._source.groups) as tick:
            stream = self._source.groups.read(tick)
            while batch := list(islice(stream, _ROWS // 8)):
                names = [name for _, group in batch for name in (*group["positives"], *group["negatives"])]
                absent = {name for name, row in zip(names, _rows(self.corpus, names).tolist(), strict=True) if row < 0}
                for where, group in batch:
                    for field in ("positives", "negatives"):
                        lost = [name for name in group[field] if name in absent]
                        missing["passage"].update({name: where for name in lost if name not in missing["passage"]})
                        dropped += len(lost)
                        group[field] = [name for name in group[field] if name not in absent]
                    group["negatives"] = group["negatives"][: self._negatives or None]
                    if group["positives"]:
                        output.write(dumps(group) + b"\n")
                        rows, count = rows + 1, count + len(group["negatives"])
        if dropped and not self._drop:
            raise _unknown(missing, dropped)
        if not rows:
            raise InputError(self._source.name, "no training query has a positive", "see its training groups")
        output.facts = {"rows": rows, "negatives": count, "dropped": dropped}

    def _write_train(self, output: Output) -> None:
        """Judgements and pairs by query; negatives are at most so many, the first of the file."""
        source, rows, dropped, count = self._source, 0, 0, 0
        with Grouper(parts_folder(self._folder), len(self.queries)) as grouper:
            if source.train is not None:
                judged = read_judgements(self._folder / "qrels" / f"{source.train}.tsv")
                while lines := list(islice(judged, _ROWS)):
                    _, queries, passages, scores = zip(*lines, strict=True)
                    positive = np.array(scores) > 0
                    grouper.add(_rows(self.queries, queries), _rows(self.corpus, passages), positive)
            if source.pairs is not None:
                dropped = self._add_pairs(grouper)
            with progress("train.jsonl", len(self.queries), "queries", shown=self._shown) as meter:
                for query, positives, negatives in grouper.groups():
                    negatives = negatives[: self._negatives or None]
                    ids = self.corpus.ids.take(np.concatenate([positives, negatives]))
                    group = {
                        "query_id": self.queries.ids[query],
                        "positives": ids[: len(positives)],
                        "negatives": ids[len(positives) :],
                    }
                    output.write(dumps(group) + b"\n")
                    rows, count = rows + 1, count + len(negatives)
                    meter.advance(query + 1 - meter.done)
        if not rows:
            raise InputError(source.name, "no training query has a positive", "see its training judgements or triples")
        output.facts = {"rows": rows, "negatives": count, "dropped": dropped}

    def _add_pairs(self, grouper: Grouper) -> int:
        """Add triples or candidates; the number of those dropped because an id has no text. Raises InputError."""
        assert self._source.pairs is not None
        missing: dict[str, dict[str, str]] = {"query": {}, "passage": {}}
        dropped = 0
        with self._reading("training pairs", self._source.pairs) as tick:
            for pairs in self._source.pairs.read(tick):
                columns = [("query", self.queries, pairs.queries), ("passage", self.corpus, pairs.negatives)]
                if pairs.positives:
                    columns.append(("passage", self.corpus, pairs.positives))
                rows = []
                for kind, texts, names in columns:
                    rows.append(_rows(texts, names))
                    for row in np.flatnonzero(rows[-1] < 0).tolist():
                        missing[kind].setdefault(names[row], pairs.where)
                known = np.all([r >= 0 for r in rows], 0)
                dropped += len(known) - int(known.sum())
                queries, negatives, *positives = (r[known] for r in rows)
                for column in positives:  # of a block's triples, each positive once
                    once = np.unique(queries << 32 | column, return_index=True)[1]
                    once.sort()
                    grouper.add(queries[once], column[once], True)
                grouper.add(queries, negatives, False)
        if dropped and not self._drop:
            raise _unknown(missing, dropped)
        return dropped


def _refuse_id(text: Text, source: str) -> None:
    """Raise InputError for an id that judgements, tab-separated lines, could not name."""
    if text.id != text.id.strip() or not text.id or not {"\t", "\n", "\r"}.isdisjoint(text.id):
        what = f"the id {text.id!r} is empty, or holds a tab, a line break or outer white space"
        raise InputError(text.where or source, what, "qrels cannot name it: rename it, in the judgements too")


def _rows(texts: Texts, names: Sequence[str]) -> np.ndarray:
    """Rows of ids; a block names few queries many times."""
    different = list(dict.fromkeys(names))
    found = dict(zip(different, texts.rows(different).tolist(), strict=True))
    return np.array([found[name] for name in names], np.int64)


def _identity(part: Part[Any] | None) -> dict[str, Any] | None:
    return None if part is None else part.identity


def _unknown(missing: dict[str, dict[str, str]], dropped: int) -> InputError:
    parts = []
    for kind, file in (("query", "queries.jsonl"), ("passage", "corpus.jsonl")):
        if missing[kind]:
            names = ", ".join(map(repr, islice(missing[kind], _NAMED)))
            more = ", ..." if len(missing[kind]) > _NAMED else ""
            parts.append(f"{len(missing[kind])} {kind} ids are not in {file}: {names}{more}")
    where = next(line for kind in ("query", "passage") for line in missing[kind].values())
    return InputError(where, "; ".join(parts), f"add their texts, or --drop-missing leaves these {dropped} lines out")


def prepare(
    source: Source,
    out: Path,
    *,
    drop_missing: bool = False,
    overwrite: bool = False,
    negatives: int = 0,
    shown: bool = True,
) -> tuple[dict[str, dict[str, Any]], bool]:
    """Write `source` into `out`: finished files with their counts, and whether there was anything to do.

    A prepare that was killed goes on where it was: finished files are compared with their checksums and kept.
    `negatives`: at most so many of a training group, 0 for all. Raises InputError for input that cannot be used; what
    was finished before stays for the next try.
    """
    with open_manifest(out, overwrite) as manifest:
        manifest.begin(source)
        builder = Builder(source, manifest, drop_missing, negatives, shown)
        keys = {name: builder.key(name) for name in builder.steps()}
        worked = False
        try:
            for name, write in builder.steps().items():
                if builder.stale(name, keys[name]):
                    worked = True
                    with manifest.writing(name, keys[name], source.corpus is None) as output:
                        write(output)
                builder.check(name)
        except InputError:
            manifest.abandon(keys.values())
            raise
        if worked or not manifest.complete:
            manifest.finish()
        return {name: manifest.files[name] for name in keys}, worked
