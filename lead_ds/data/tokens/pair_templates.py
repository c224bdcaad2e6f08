"""How a query and a passage become one prompt of a reranker, and what of it is cut where it is too long."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lead_ds.data.tokens.long_texts import shortened, without_middles

Rows = list[list[int]]
Span = tuple[int, int]  # of characters

_PLACES = re.compile(r"(\{(?:instruction|query|passage)\})")


class PairTemplate(Protocol):
    """Makes token rows of pairs, in place of the tokenizer's own pairs."""

    def rows(
        self, tokenizer: Any, queries: Sequence[str], passages: Sequence[str], length: int
    ) -> tuple[Rows, Rows | None]:
        """Token ids of each pair, and token types where it gives them. length: `max_length`."""

    def __str__(self) -> str:
        """The prompt, for a person to read."""


@dataclass(frozen=True)
class Filled:
    """A template whose places are filled in. Where it is too long the passage is cut, then the query; the rest stays."""

    template: str
    instruction: str = ""
    leading: tuple[int, ...] = ()  # what the tokenizer puts before a text
    trailing: tuple[int, ...] = ()  # and behind it

    def rows(self, tokenizer: Any, queries: Sequence[str], passages: Sequence[str], length: int) -> tuple[Rows, None]:
        """See `PairTemplate`. A query keeps up to 3/4 of the room beside the template, and what its passage does not need."""
        queries, passages = (without_middles(tokenizer, texts, length) for texts in (queries, passages))
        filled = [self._filled(query, passage) for query, passage in zip(queries, passages, strict=True)]
        encoded = tokenizer(
            [text for text, _ in filled],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # what is too long is cut below: no warning about its length
        )
        start, end = list(self.leading), list(self.trailing)
        rows = []
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], filled, strict=True):
            excess = len(start) + len(ids) + len(end) - length
            dropped = _dropped(offsets, spans, excess) if excess > 0 else ()
            rows.append(start + [token for i, token in enumerate(ids) if i not in dropped] + end)
        return rows, None

    def _filled(self, query: str, passage: str) -> tuple[str, dict[str, list[Span]]]:
        """The text of a pair, and where its query and its passage lie."""
        values = {"{instruction}": self.instruction, "{query}": query, "{passage}": passage}
        text, spans = "", {"{query}": list[Span](), "{passage}": list[Span]()}
        for piece in _PLACES.split(self.template):
            start = len(text)
            text += values.get(piece, piece)
            if piece in spans:
                spans[piece].append((start, len(text)))
        return text, spans

    def __str__(self) -> str:
        return self.template


@dataclass(frozen=True)
class Whole:
    """A template read as one text with the tokenizer's special tokens, of which the end is cut, whatever stands there."""

    template: str  # with {query} and {passage}

    def rows(self, tokenizer: Any, queries: Sequence[str], passages: Sequence[str], length: int) -> tuple[Rows, None]:
        texts = []
        for query, passage in zip(queries, passages, strict=True):
            filled = {"{query}": query, "{passage}": passage}
            texts.append("".join(filled.get(piece, piece) for piece in _PLACES.split(self.template)))
        read = shortened(tokenizer, texts, length)
        return tokenizer(read, truncation=True, max_length=length, return_attention_mask=False)["input_ids"], None

    def __str__(self) -> str:
        return self.template


@dataclass(frozen=True)
class Enclosed:
    """A body between a head and a tail, each read apart. Of a body that is too long the end is cut."""

    head: str
    body: str  # with {query} and {passage}
    tail: str
    instruction: str

    def rows(self, tokenizer: Any, queries: Sequence[str], passages: Sequence[str], length: int) -> tuple[Rows, None]:
        """See `PairTemplate`. `length` counts head and tail."""
        head, tail = (_ids(tokenizer, text) for text in (self.head, self.tail))
        room = max(length - len(head) - len(tail), 1)
        texts = []
        for query, passage in zip(queries, passages, strict=True):
            filled = {"{instruction}": self.instruction, "{query}": query, "{passage}": passage}
            texts.append("".join(filled.get(piece, piece) for piece in _PLACES.split(self.body)))
        read = shortened(tokenizer, texts, room)
        bodies = tokenizer(read, truncation=True, max_length=room, return_attention_mask=False)["input_ids"]
        return [head + body + tail for body in bodies], None

    def __str__(self) -> str:
        return self.head + self.body + self.tail


@dataclass(frozen=True)
class Joined:
    """Query, separator and passage, each read apart. A query has up to 3/4 of the length, a passage what is left."""

    query: str  # with {query}
    passage: str  # with {passage}
    head: str = ""
    tail: tuple[str, ...] = ()  # behind one more separator
    begin: int | None = None  # a token that counts as the query's
    instruction: str = ""
    positions: int | None = None  # of the model, where head and tail must fit as well

    def rows(self, tokenizer: Any, queries: Sequence[str], passages: Sequence[str], length: int) -> tuple[Rows, None]:
        """See `PairTemplate`. `length` counts neither head nor tail."""
        between, head = _ids(tokenizer, "\n"), _ids(tokenizer, self.head) if self.head else []
        tail = [*between, *(token for part in self.tail for token in _ids(tokenizer, part))]
        if self.positions is not None:
            length = min(length, self.positions - len(head) - len(tail))
        stated = f"instruction: {self.instruction}\n" if self.instruction else ""
        firsts = [stated + self.query.replace("{query}", query) for query in queries]
        seconds = [self.passage.replace("{passage}", passage) for passage in passages]
        pairs = zip(_ids(tokenizer, firsts, length * 3 // 4), _ids(tokenizer, seconds, length), strict=True)
        rows = []
        for first, second in pairs:
            first = first if self.begin is None else [self.begin, *first]
            second = between + second
            excess = len(first) + len(second) - length
            rows.append([*head, *first, *(second[:-excess] if 0 < excess < len(second) else second), *tail])
        return rows, None

    def __str__(self) -> str:
        return f"{self.head}{self.query}\n{self.passage}\n{''.join(self.tail)}"


@dataclass(frozen=True)
class Conversation:
    """A chat template, as sentence-transformers' Transformer fills it in and cuts it."""

    reader: Any  # it, without weights
    prompt: str = ""  # the system's message

    def rows(
        self, tokenizer: Any, queries: Sequence[str], passages: Sequence[str], length: int
    ) -> tuple[Rows, Rows | None]:
        """See `PairTemplate`. Raises ValueError where the template has no place for a query and a passage."""
        queries, passages = (shortened(self.reader.tokenizer, texts, length) for texts in (queries, passages))
        return _rendered(self.reader, list(zip(queries, passages, strict=True)), length, prompt=self.prompt or None)

    def __str__(self) -> str:
        return str(self.reader.tokenizer.chat_template)


@dataclass(frozen=True)
class Message:
    """A chat template that a text alone is put to, its prompt as the system's message, as sentence-transformers does it."""

    reader: Any  # its Transformer, without weights

    def rows(self, texts: Sequence[str], prompt: str, task: str, length: int) -> tuple[Rows, Rows | None]:
        """Token ids of each text, and token types where there are some. task: query or document, which a template may ask for."""
        read = shortened(self.reader.tokenizer, texts, length)
        return _rendered(self.reader, list(read), length, prompt=prompt or None, task=task)

    def __str__(self) -> str:
        return str(self.reader.tokenizer.chat_template)


def _rendered(reader: Any, inputs: list[Any], length: int, **how: Any) -> tuple[Rows, Rows | None]:
    """Token ids and types of what sentence-transformers' Transformer makes of texts or pairs, without padding."""
    limits = {"text": {"max_length": length}, "chat_template": {"max_length": length}}
    found = reader.preprocess(inputs, processing_kwargs=limits, **how)
    masks = found["attention_mask"].bool()
    kept = [
        [row[mask].tolist() for row, mask in zip(found[name], masks, strict=True)] if name in found else None
        for name in ("input_ids", "token_type_ids")
    ]
    return kept[0] or [], kept[1]


def _dropped(offsets: Sequence[Span], spans: dict[str, list[Span]], excess: int) -> set[int]:
    """The tokens that are cut: of those that lie in the query or the passage alone, for one that straddles an edge belongs
    to the prompt as well."""
    query, passage = (
        [i for i, (a, b) in enumerate(offsets) if b > a and any(first <= a and b <= last for first, last in places)]
        for places in (spans["{query}"], spans["{passage}"])
    )
    room = max(len(query) + len(passage) - excess, 0)
    asked = max(room * 3 // 4, room - len(passage))
    return {*query[asked:], *passage[room - min(asked, len(query)) :]}


def _ids(tokenizer: Any, text: Any, length: int | None = None) -> Any:
    """Tokens of a text or of texts alone, without special ones."""
    cut: dict[str, Any] = {"verbose": False} if length is None else {"truncation": True, "max_length": max(length, 1)}
    if length is not None:
        text = shortened(tokenizer, text, length)
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, **cut)["input_ids"]
