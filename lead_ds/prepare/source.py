"""What a source offers to the builder: texts, judgements and training material, each readable again from its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Tick = Callable[[int], None]  # so many more bytes or rows are read


class Text(NamedTuple):
    """A passage, or a query (whose title is empty)."""

    id: str
    title: str
    text: str
    where: str = ""  # file:line, for errors; empty where the reader does not know it


class Judgement(NamedTuple):
    """One judged pair."""

    where: str
    query: str
    passage: str
    score: int


class Pairs(NamedTuple):
    """Training pairs of one block: equally long columns of ids. `positives` is empty for lists of candidates."""

    where: str
    queries: list[str]
    positives: list[str]
    negatives: list[str]


@dataclass(frozen=True)
class Part(Generic[T]):
    """A stream of one kind of record, and how long it is."""

    read: Callable[[Tick], Iterator[T]]
    total: int  # 0 where nobody knows
    unit: Literal["bytes", "rows"] = "bytes"
    identity: dict[str, Any] = field(default_factory=dict)  # changes when what it reads has changed


@dataclass(frozen=True)
class Source:
    """One source, opened: nothing of it is read yet but what names its parts."""

    kind: str
    name: str
    queries: Part[Text]
    corpus: Part[Text] | None = None  # None: OUT has its corpus already
    qrels: dict[str, Part[Judgement]] = field(default_factory=dict)
    train: str | None = None  # the split whose judgements are training groups
    pairs: Part[Pairs] | None = None  # triples, or candidates to draw negatives from
    groups: Part[tuple[str, dict[str, Any]]] | None = None  # training groups, each after the line it comes from
    versions: dict[str, str] = field(default_factory=dict)  # of libraries that read it
