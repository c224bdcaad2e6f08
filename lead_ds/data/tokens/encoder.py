"""Text to tokens, as one model reads it: its own tokenizer, prompts and lengths.

Dimensions: B texts or pairs, L tokens of the longest of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.tokens.ids import ids_and_types
from lead_ds.data.tokens.long_texts import shortened
from lead_ds.data.tokens.pair_templates import Message, PairTemplate
from lead_ds.errors import InputError

Tokens = dict[str, Tensor]
"""input_ids, attention_mask, where the model uses them token_type_ids, for ColBERT score_mask, where pooling leaves prompts out
pool_mask: int64 [B, L]."""

Rows = Sequence[Sequence[int] | np.ndarray]


def score_mask(tokens: Tokens) -> Tensor:
    """[B, L]: 1 where a token counts in MaxSim."""
    return tokens.get("score_mask", tokens["attention_mask"])


@dataclass(frozen=True)
class Expansion:
    """ColBERT's query expansion: a query's row is filled up to `length` with `token`, whose states count in its score."""

    length: int
    token: int
    attended: bool = False  # whether the query's own tokens see them


@dataclass
class TextEncoder:
    """How one model reads queries, passages and pairs. Always padded on the right, to the longest of the batch.

    `lead_ds.models.load.load_text` makes it of a configuration. Picklable, and safe to use from several threads: a fast
    tokenizer is not, so calls of it take turns.
    """

    path: str
    tokenizer: Any
    reads_pairs: bool = False  # a query and a passage as one text: `pairs`, in place of `queries` and `passages`
    scores_tokens: bool = False  # late interaction: `score_mask` marks the tokens that count
    query_prompt: str = ""
    passage_prompt: str = ""
    query_length: int = 0  # of a model of texts: 0 of one of pairs, and the other way round
    passage_length: int = 0
    max_length: int = 0
    longest: int | None = None  # tokens that the model's own files have it read at most
    token_types: bool = False
    expansion: Expansion | None = None  # of queries
    skip_tokens: frozenset[int] = frozenset()  # passage tokens that never count
    skip_in_queries: bool = False  # nor do they in a query
    attends: bool = True  # False: of an empty text nothing is read
    unpooled: tuple[int, int] | None = None  # tokens of a query's and a passage's prompt, where pooling leaves them out
    words: int | None = None  # of a model that has fewer embeddings than its tokenizer has tokens: how many
    template: PairTemplate | None = None  # of a pair's prompt; None: the tokenizer's own pairs
    message: Message | None = None  # the chat template that a text alone is put to; None: prompt and text as they are
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def serving(self) -> TextEncoder:
        """The same with queries as long as passages may be: what is served knows one length, as sentence-transformers does.

        `query_length` is a bound for training, where a batch is as slow as its longest query.
        """
        longest = max(self.query_length, self.passage_length)
        return replace(self, query_length=longest, passage_length=longest)

    def queries(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Queries with their prompt, cut to `length` (default query_length) tokens.

        Late interaction: `score_mask` marks the tokens that count. With query expansion every row is filled up with mask
        tokens, which count in the score.
        """
        rows, types = self._rows(texts, "queries", length or self.query_length)
        return self.query_tokens(rows, types, length)

    def query_tokens(self, rows: Rows, types: Rows | None = None, length: int | None = None) -> Tokens:
        """`queries`, of their tokens."""
        wide = self.expansion
        tokens = self.padded(rows, types, min(length or wide.length, wide.length) if wide is not None else 0)
        if self.scores_tokens:
            tokens["score_mask"] = tokens["attention_mask"].clone()
            if wide is not None:
                width = tokens["input_ids"].shape[1]
                added = (tokens["attention_mask"] == 0) & (torch.arange(width) < wide.length)
                tokens["input_ids"].masked_fill_(added, wide.token)
                tokens["score_mask"].masked_fill_(added, 1)
                if wide.attended:
                    tokens["attention_mask"].masked_fill_(added, 1)
            if self.skip_in_queries:
                self._skip(tokens)
        return self._without_prompt(tokens, 0)

    def passages(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Passages with their prompt, cut to `length` (default passage_length) tokens.

        Late interaction: `score_mask` marks the tokens that count: all real ones, without punctuation where that is masked.
        """
        return self.passage_tokens(*self._rows(texts, "passages", length or self.passage_length))

    def passage_tokens(self, rows: Rows, types: Rows | None = None) -> Tokens:
        """`passages`, of their tokens."""
        tokens = self.padded(rows, types)
        if self.scores_tokens:
            tokens["score_mask"] = tokens["attention_mask"].clone()
            self._skip(tokens)
        return self._without_prompt(tokens, 1)

    def _without_prompt(self, tokens: Tokens, side: int) -> Tokens:
        if self.unpooled is not None:
            tokens["pool_mask"] = tokens["attention_mask"].clone()
            tokens["pool_mask"][:, : self.unpooled[side]] = 0
        return tokens

    def _skip(self, tokens: Tokens) -> None:
        skip = torch.tensor(sorted(self.skip_tokens), dtype=torch.int64)
        tokens["score_mask"] *= (~torch.isin(tokens["input_ids"], skip)).long()

    def rows(self, texts: Sequence[str], kind: Literal["queries", "passages"]) -> tuple[Rows, Rows | None]:
        """Token ids, and token types where the model uses them, of each text as `queries` or `passages` cut it, without
        padding: `padded` makes tokens of any of them."""
        return self._rows(texts, kind, self.query_length if kind == "queries" else self.passage_length)

    def _rows(
        self, texts: Sequence[str], kind: Literal["queries", "passages"], length: int
    ) -> tuple[Rows, Rows | None]:
        prompt = self.query_prompt if kind == "queries" else self.passage_prompt
        if self.message is None:
            return self._encode([prompt + text for text in texts], None, length)
        with self._lock:
            rows, types = self.message.rows(texts, prompt, "query" if kind == "queries" else "document", length)
            self._forget_truncation()
        return rows, types if self.token_types else None

    def alone(self, texts: Sequence[str], asking: Sequence[bool]) -> Tokens:
        """Texts in one table: those that are asking as `queries`, the others as `passages` reads them. Not late interaction."""
        rows: list[Any] = [()] * len(texts)
        types: list[Any] = [()] * len(texts)
        kinds: tuple[tuple[Literal["queries", "passages"], bool], ...] = (("queries", True), ("passages", False))
        for kind, wanted in kinds:
            places = [place for place, asks in enumerate(asking) if asks == wanted]
            if places:
                found, kinds_of = self.rows([texts[place] for place in places], kind)
                for at, place in enumerate(places):
                    rows[place] = found[at]
                    types[place] = () if kinds_of is None else kinds_of[at]
        return self.padded(rows, types if self.token_types else None)

    def spans(
        self, texts: Sequence[str], kind: Literal["queries", "passages"]
    ) -> tuple[list[list[tuple[int, int]]], int]:
        """Character spans of each text's tokens as `queries` or `passages` cut them, and where texts begin behind the prompt.

        Special tokens have empty spans. Raises InputError where the tokenizer does not know them.
        """
        if not self.tokenizer.is_fast or self.message is not None:
            what = "its tokenizer gives no offsets" if self.message is None else "a chat template gives no offsets"
            raise InputError(self.path, what, "use a model with a tokenizer.json and without a chat template")
        prompt = self.query_prompt if kind == "queries" else self.passage_prompt
        length = self.query_length if kind == "queries" else self.passage_length
        with self._lock:
            encoded = self.tokenizer(
                [prompt + text for text in texts],
                truncation=True,
                max_length=length,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            self._forget_truncation()
        return encoded["offset_mapping"], len(prompt)

    def reads_like(self, other: TextEncoder) -> bool:
        """Whether both give every text the same tokens."""
        if not (self.tokenizer.is_fast and other.tokenizer.is_fast) or self.message or other.message:
            return False
        settings = ("query_prompt", "passage_prompt", "query_length", "passage_length", "expansion")
        same = all(getattr(self, name) == getattr(other, name) for name in settings)
        return same and self.tokenizer.backend_tokenizer.to_str() == other.tokenizer.backend_tokenizer.to_str()

    def pairs(self, queries: Sequence[str], passages: Sequence[str]) -> Tokens:
        """Query i with passage i, in max_length tokens.

        Without a template: the tokenizer's own pair, the longer text cut first. Else what the template makes of it, and cuts.
        """
        return self.padded(*self.pair_rows(queries, passages))

    def pair_rows(self, queries: Sequence[str], passages: Sequence[str]) -> tuple[Rows, Rows | None]:
        """The tokens and types of `pairs`, before they are padded."""
        first = [self.query_prompt + text for text in queries]
        second = [self.passage_prompt + text for text in passages]
        if self.template is None:
            return self._encode(first, second, self.max_length)
        with self._lock:
            rows, types = self.template.rows(self.tokenizer, first, second, self.max_length)
            self._forget_truncation()
        return rows, types if self.token_types else None

    def ids(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        """The tokens of texts as they are, each read alone and cut to `length`; None: as part of a pair, whole.

        Raises InputError where a text alone has types that are not all 0: those would be lost.
        """
        alone = length is not None
        with self._lock:
            encoded = self.tokenizer(
                list(texts if length is None else shortened(self.tokenizer, texts, length)),
                truncation=alone,
                max_length=length,
                add_special_tokens=alone,
                return_attention_mask=False,
                return_token_type_ids=self.token_types,
                verbose=False,  # what is whole may be longer than the model reads
            )
            self._forget_truncation()
        if alone and self.token_types and any(map(any, encoded["token_type_ids"])):
            what = "its tokenizer gives a text alone other types than 0"
            raise InputError(self.path, what, "set data.token_cache: false")
        return encoded["input_ids"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The tokenizer, for a call of its own."""
        with self._lock:
            yield

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _encode(self, texts: list[str], pairs: list[str] | None, length: int) -> tuple[Rows, Rows | None]:
        if not texts:
            raise ValueError("no texts to encode")
        with self._lock:
            found = ids_and_types(self.tokenizer, texts, pairs, length, types=self.token_types)
            self._forget_truncation()
        return found

    def padded(self, rows: Rows, types: Rows | None, length: int = 0) -> Tokens:
        """Rows of tokens and of types, padded to the longest, or to `length`. Raises InputError for a token beyond `words`."""
        pad = self.tokenizer.pad_token_id
        # An empty text of a tokenizer that adds nothing: one token to attend to, or a softmax over nothing is NaN.
        empty = [i for i, row in enumerate(rows) if not len(row)]
        rows = [row if len(row) else [pad] for row in rows]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        width = max(int(lengths.max()), length)
        mask = np.arange(width) < lengths[:, None]
        ids = np.full((len(rows), width), pad, np.int64)
        ids[mask] = np.concatenate(rows)
        if not self.attends:
            mask[empty] = False
        if self.words is not None and ids.max() >= self.words:
            self._refuse(ids)
        tokens = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.token_types:
            table = np.zeros((len(rows), width), np.int64)
            if types is not None and any(len(row) for row in types):
                table[mask] = np.concatenate([row if len(row) else [0] for row in types])
            tokens["token_type_ids"] = torch.from_numpy(table)
        return tokens

    def _refuse(self, ids: np.ndarray) -> NoReturn:
        row, place = np.argwhere(ids >= self.words)[0]
        token, text = self.tokenizer.convert_ids_to_tokens(int(ids[row, place])), self.tokenizer.decode(ids[row][:40])
        what = f"has {self.words} embeddings, and none for {token!r} (token {ids[row, place]}) in the text {text!r}"
        raise InputError(self.path, what, "mend the text, or use the tokenizer that belongs to the model")

    def _forget_truncation(self) -> None:
        # The tokenizer keeps the last call's truncation and would save it into the student's tokenizer.json.
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_truncation()
