"""Formats of training groups whose records carry their texts: our own, Tevatron, FlagEmbedding, sentence-transformers."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lead_ds.data.collections.texts import passage_text
from lead_ds.io.jsonl import misspelt, unknown_key

Record = dict[str, Any]

# What a record of each format looks like, as errors say it.
FORMATS = {
    "texts": '{"query", "positives": [text], "negatives": [text], "scores": [number]}, scores if there are any',
    "tevatron": '{"query_id", "query", "positive_passages": [{"docid", "title", "text", "score"?}], "negative_passages"}',
    "flagembedding": '{"query", "pos": [text], "neg": [text]}, and pos_scores, neg_scores, prompt if there are any',
}

FLOAT32_MAX = 3.4e38  # scores are kept in 32 bits

LABELS = ("label", "labels", "score", "scores")  # sentence-transformers: columns that are not text


@dataclass
class Listed:
    """A passage as a line lists it."""

    text: str
    name: str | None = None
    score: float = math.nan

    @property
    def key(self) -> int:
        """A 63-bit hash of what the passage is known by."""
        return key_of(self.text if self.name is None else self.name)


@dataclass
class Lines:
    """What one group's lines hold."""

    query: str
    positives: list[Listed]
    negatives: list[Listed]
    name: str | None = None

    def scored(self) -> Lines:
        """The same without passages that have no score."""
        positives, negatives = (
            [passage for passage in some if math.isfinite(passage.score)] for some in (self.positives, self.negatives)
        )
        return Lines(self.query, positives, negatives, self.name)


def is_query(lines: Lines, passage: Listed) -> bool:
    """Whether a passage is the query itself, by its id or its text."""
    return (lines.name is not None and passage.name == lines.name) or passage.text.strip() == lines.query.strip()


class Unusable(Exception):
    """Why a record is not a group: what is wrong and what to do."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


class Reader:
    """One format: a record's texts. `known`: its fields. `grouped`: consecutive records of one query make a group."""

    def __init__(self, one: Callable[[Record], Lines], known: Sequence[str], grouped: bool = False) -> None:
        self.one, self.known, self.grouped = one, known, grouped
        self._seen: set[tuple[str, ...]] = set()

    def checked(self, record: Record) -> Lines:
        """`one` of a record that misspells no field. Raises Unusable."""
        if (fields := tuple(record)) not in self._seen:
            if found := misspelt(fields, self.known):
                raise Unusable(*unknown_key(*found))
            self._seen.add(fields)
        return self.one(record)

    def join(self, records: Sequence[Record]) -> Lines:
        """The group of consecutive records of one query."""
        parts = [self.checked(record) for record in records]
        positives = [passage for part in parts for passage in part.positives]
        return Lines(parts[0].query, positives, [passage for part in parts for passage in part.negatives])


def _tevatron(record: Record) -> Lines:
    shape = f"each line is {FORMATS['tevatron']}"
    query = _text(record, "query", shape)
    lists = []
    for field in ("positive_passages", "negative_passages"):
        found = record.get(field) or []
        if not isinstance(found, list) or not all(
            isinstance(passage, dict)
            and isinstance(passage.get("text"), str)
            and isinstance(passage.get("title"), str | None)
            for passage in found
        ):
            raise Unusable(
                f"the field {field!r} is not a list of passages with a text, and a title that is a text", shape
            )
        for passage in found:
            if near := misspelt(passage, ("docid", "title", "text", "score")):
                raise Unusable(*unknown_key(*near))
        given = [passage.get("score") for passage in found]
        scores = [math.nan if score is None else score for score in given]
        if not _numbers(scores):
            raise Unusable(f"a 'score' in {field!r} is not a number", shape)
        lists.append(
            [
                Listed(passage_text(passage.get("title"), passage["text"]), _optional(passage.get("docid")), score)
                for passage, score in zip(found, scores, strict=True)
            ]
        )
    return Lines(query, lists[0], lists[1], _optional(record.get("query_id")))


def _flagembedding(record: Record) -> Lines:
    shape = f"each line is {FORMATS['flagembedding']}"
    prompt = record.get("prompt") or ""
    if not isinstance(prompt, str):
        raise Unusable("the field 'prompt' is not a text", shape)
    query = prompt + _text(record, "query", shape)
    lists = []
    for field in ("pos", "neg"):
        texts = _texts(record, field, shape)
        scores = record.get(f"{field}_scores")
        if scores is None:
            scores = [math.nan] * len(texts)
        if not _numbers(scores) or len(scores) != len(texts):
            raise Unusable(f"the field '{field}_scores' is not one number below 3e38 for each text of {field!r}", shape)
        lists.append([Listed(text, None, score) for text, score in zip(texts, scores, strict=True)])
    return Lines(query, lists[0], lists[1])


def _plain(record: Record) -> Lines:
    shape = f"each record is {FORMATS['texts']}"
    query = _text(record, "query", shape)
    positives, negatives = _texts(record, "positives", shape), _texts(record, "negatives", shape)
    texts, scores = [*positives, *negatives], record.get("scores")
    if scores is None:
        scores = [math.nan] * len(texts)
    if not _numbers(scores) or len(scores) != len(texts):
        raise Unusable("the field 'scores' is not one number for each positive, then each negative", shape)
    listed = [Listed(text, None, score) for text, score in zip(texts, scores, strict=True)]
    return Lines(query, listed[: len(positives)], listed[len(positives) :])


class Columns:
    """sentence-transformers' columns: a query, then a positive, then negatives, by name or else by order; and labels.

    With several passages, labels are scores of each of them, or margins of the positive over each negative (one number
    for one negative), as MarginMSELoss reads them. With margins a positive's score is taken as 0, which leaves margins
    and every softmax as they are. With one passage, a `label` above 0 marks a positive, and consecutive lines of one
    query make a group. With a list of passages, a list of labels does the same.
    """

    def __init__(self, record: Record) -> None:
        columns = [name for name, value in record.items() if isinstance(value, str | list) and name not in LABELS]
        self.label = next((name for name in LABELS if name in record), None)
        negatives = [name for name in columns if re.fullmatch(r"negatives?([_-]?\d+)?", name)]
        if "positive" in columns and len(columns) - len(negatives) == 2:
            query = next(name for name in columns if name != "positive" and name not in negatives)
            columns = [query, "positive", *sorted(negatives, key=_natural)]
        self.columns = columns
        self.labelled = len(columns) == 2 and self.label in ("label", "labels")
        self.grouped = self.labelled and isinstance(record[columns[1]], str)
        wrong = len(columns) < 2 or (len(columns) == 2 and self.label is not None and not self.labelled)
        if wrong:
            what = "pairs with a score and no label do not say which passages are positive"
            raise Unusable(
                what if len(columns) == 2 else f"{len(columns)} text column",
                "give columns anchor, positive, negative_1, ..., or anchor, passage, label",
            )
        self.shape = f"each line has the columns {', '.join(columns)}" + (f" and {self.label}" if self.label else "")

    def __call__(self, record: Record) -> Lines:
        query, *texts = (record.get(name) for name in self.columns)
        if self.labelled and isinstance(texts[0], list):
            texts = texts[0]
        if not isinstance(query, str) or not set(map(type, texts)) <= {str}:
            names = [name for name in self.columns if not isinstance(record.get(name), str)]
            raise Unusable(f"the column {(names or self.columns)[-1]!r} is not a text", self.shape)
        if self.label is None:
            return _listed(query, texts, [math.nan] * len(texts))
        labels = record.get(self.label)
        if isinstance(labels, int | float):
            labels = [labels]
        if not _numbers(labels):
            raise Unusable(f"the column {self.label!r} is not a number or a list of numbers below 3e38", self.shape)
        assert isinstance(labels, list)
        if self.labelled and len(labels) == len(texts):
            passages = [(Listed(str(text)), label > 0) for text, label in zip(texts, labels, strict=True)]
            return Lines(
                query, [p for p, relevant in passages if relevant], [p for p, relevant in passages if not relevant]
            )
        if not self.labelled and len(labels) == len(texts):
            return _listed(query, texts, labels)
        if not self.labelled and len(labels) == len(texts) - 1:
            return _listed(query, texts, [0.0, *(-margin for margin in labels)])
        raise Unusable(f"{len(labels)} labels for {len(texts)} passages", self.shape)


def _listed(query: str, texts: list[Any], scores: list[float]) -> Lines:
    passages = [Listed(text, None, score) for text, score in zip(texts, scores, strict=True)]
    return Lines(query, passages[:1], passages[1:])


def reader_of(form: str, first: Record) -> Reader:
    """The reader of a format, which for columns goes by the file's first record. Raises Unusable."""
    if form == "texts":
        return Reader(_plain, ("query", "positives", "negatives", "scores"))
    if form == "tevatron":
        return Reader(_tevatron, ("query_id", "query", "positive_passages", "negative_passages"))
    if form == "flagembedding":
        return Reader(_flagembedding, ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt"))
    columns = Columns(first)
    # A label by any of its names is one; text columns go by their order, whatever they are called.
    return Reader(columns, [*columns.columns, *(LABELS if columns.label is None else [columns.label])], columns.grouped)


# Columns that name a text: whoever took one for a query would train on names.
IDS = frozenset(("_id", "id", "docid", "pid", "qid", "query_id", "query-id", "corpus_id", "corpus-id"))


def form_of(first: Record) -> str | None:
    """The format of records that carry their texts, by the first of them; None where it is not a known one."""
    if "query" in first and "positives" in first:
        return "texts"
    if "positive_passages" in first:
        return "tevatron"
    if "query" in first and "pos" in first:
        return "flagembedding"
    columns = [name for name, value in first.items() if isinstance(value, str | list) and name not in LABELS]
    known = len(columns) >= 2 and isinstance(first[columns[0]], str) and IDS.isdisjoint(first)
    return "sentence-transformers" if known else None


def _texts(record: Record, field: str, shape: str) -> list[str]:
    texts = record.get(field) or []
    if not isinstance(texts, list) or not set(map(type, texts)) <= {str}:
        raise Unusable(f"the field {field!r} is not a list of texts", shape)
    return texts


def _text(record: Record, field: str, shape: str) -> str:
    if not isinstance(record.get(field), str):
        raise Unusable(f"no text in the field {field!r}" if field in record else f"no field {field!r}", shape)
    return record[field]


def _optional(name: object) -> str | None:
    return None if name is None else str(name)


def _numbers(values: object) -> bool:
    return (
        isinstance(values, list)
        and set(map(type, values)) <= {int, float, bool}
        and all(abs(value) < FLOAT32_MAX for value in values if value == value)  # NaN: none is given
    )


def _natural(name: str) -> int:
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else 0


def key_of(text: str) -> int:
    """A 63-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
