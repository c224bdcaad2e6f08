"""Text to tokens, as one model reads it: its own tokenizer, prompts and lengths.

Dimensions: B texts or pairs, L tokens of the longest of them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.tokens.model_files import ReadingFacts, reading_facts
from lead_ds.data.tokens.tokenizer import (
    end_with_eos,
    keep_markers_whole,
    leading_tokens,
    load_tokenizer,
    punctuation_tokens,
)
from lead_ds.errors import InputError

if TYPE_CHECKING:
    pass

Tokens = dict[str, Tensor]
"""input_ids, attention_mask, where the model uses them token_type_ids, and for ColBERT score_mask: int64 [B, L]."""

Rows = Sequence[Sequence[int] | np.ndarray]


@dataclass
class TextEncoder:
    """How one model reads queries, passages and pairs. Always padded on the right, to the longest of the batch.

    Picklable, and safe to use from several threads: a fast tokenizer is not, so calls of it take turns.
    """

    kind: str
    path: str
    tokenizer: Any
    query_prompt: str = ""
    passage_prompt: str = ""
    query_length: int = 32
    passage_length: int = 128
    max_length: int = 256
    token_types: bool = False
    query_expansion: bool = False
    skip_tokens: frozenset[int] = frozenset()  # colbert: passage tokens that never match
    template: str = ""
    instruction: str = ""
    leading: tuple[int, ...] = ()  # llm_reranker: what the tokenizer puts before a text
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: Any) -> TextEncoder:
        """The encoder of a teacher's or student's configuration.

        Prompts that are null come from the model's config_sentence_transformers.json (or PyLate's prefixes). A dual encoder
        that pools the last token ends every text with the EOS token: where its tokenizer adds no special token at
        the end, the tokenizer itself is changed to, so that a saved student carries it. A tokenizer without a pad token
        pads with EOS. Raises InputError when the tokenizer cannot be loaded or lacks what the configuration needs, and
        when a length exceeds the model's positions.
        """
        kind = str(getattr(config, "kind", "dual_encoder"))
        facts = reading_facts(config.path, config.trust_remote_code)
        tokenizer = load_tokenizer(config.path, facts.subfolder, config.trust_remote_code)
        max_length = int(getattr(config, "max_length", config.passage_length))
        _check_lengths(config, kind, facts, max_length)
        prompts = [
            given if given is not None else found or ""
            for given, found in (
                (config.query_prompt, facts.query_prompt),
                (config.passage_prompt, facts.passage_prompt),
            )
        ]
        if kind == "dual_encoder" and (config.pooling == "last" or (config.pooling == "auto" and facts.last_pooling)):
            end_with_eos(tokenizer)
        expansion = facts.query_expansion if config.query_expansion is None else config.query_expansion
        punctuation = facts.mask_punctuation if config.mask_punctuation is None else config.mask_punctuation
        if kind == "colbert":
            keep_markers_whole(tokenizer, prompts)
            if expansion and tokenizer.mask_token_id is None:
                raise InputError(config.path, "its tokenizer has no mask token", "set query_expansion: false")
        if kind == "llm_reranker" and not tokenizer.is_fast:
            raise InputError(config.path, "its tokenizer gives no offsets", "use a model with a tokenizer.json")
        types = "token_type_ids" in tokenizer.model_input_names
        return cls(
            kind=kind,
            path=config.path,
            tokenizer=tokenizer,
            query_prompt=prompts[0],
            passage_prompt=prompts[1],
            query_length=config.query_length,
            passage_length=config.passage_length,
            max_length=max_length,
            token_types=types if facts.token_types is None else types and facts.token_types,
            query_expansion=kind == "colbert" and expansion,
            skip_tokens=punctuation_tokens(tokenizer) if kind == "colbert" and punctuation else frozenset(),
            template=str(getattr(config, "template", "")),
            instruction=str(getattr(config, "instruction", "")),
            leading=leading_tokens(tokenizer),
        )

    def serving(self) -> TextEncoder:
        """The same with queries as long as passages may be: what is served knows one length, as sentence-transformers does.

        `query_length` is a bound for training, where a batch is as slow as its longest query.
        """
        longest = max(self.query_length, self.passage_length)
        return replace(self, query_length=longest, passage_length=longest)

    def queries(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Queries with their prompt, cut to `length` (default query_length) tokens.

        ColBERT: `score_mask` marks the tokens that count. With query expansion every row is filled up to `length` with mask
        tokens, which count in the score and are not attended to.
        """
        rows, types = self._encode([self.query_prompt + text for text in texts], None, length or self.query_length)
        return self.query_tokens(rows, types, length)

    def query_tokens(self, rows: Rows, types: Rows | None = None, length: int | None = None) -> Tokens:
        """`queries`, of their tokens."""
        tokens = self.padded(rows, types, (length or self.query_length) if self.query_expansion else 0)
        if self.kind == "colbert":
            tokens["score_mask"] = tokens["attention_mask"].clone()
            if self.query_expansion:
                tokens["input_ids"].masked_fill_(tokens["attention_mask"] == 0, self.tokenizer.mask_token_id)
                tokens["score_mask"].fill_(1)
        return tokens

    def passages(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Passages with their prompt, cut to `length` (default passage_length) tokens.

        ColBERT: `score_mask` marks the tokens that count: all real ones, without punctuation where that is masked.
        """
        rows, types = self._encode([self.passage_prompt + text for text in texts], None, length or self.passage_length)
        return self.passage_tokens(rows, types)

    def passage_tokens(self, rows: Rows, types: Rows | None = None) -> Tokens:
        """`passages`, of their tokens."""
        tokens = self.padded(rows, types)
        if self.kind == "colbert":
            skip = torch.tensor(sorted(self.skip_tokens), dtype=torch.int64)
            tokens["score_mask"] = tokens["attention_mask"] * (~torch.isin(tokens["input_ids"], skip)).long()
        return tokens

    def rows(self, texts: Sequence[str], kind: Literal["queries", "passages"]) -> tuple[Rows, Rows | None]:
        """Token ids, and token types where the model uses them, of each text as `queries` or `passages` cut it, without
        padding: `padded` makes tokens of any of them."""
        prompt = self.query_prompt if kind == "queries" else self.passage_prompt
        length = self.query_length if kind == "queries" else self.passage_length
        return self._encode([prompt + text for text in texts], None, length)

    def spans(
        self, texts: Sequence[str], kind: Literal["queries", "passages"]
    ) -> tuple[list[list[tuple[int, int]]], int]:
        """Character spans of each text's tokens as `queries` or `passages` cut them, and where texts begin behind the prompt.

        Special tokens have empty spans. Raises InputError where the tokenizer cannot tell.
        """
        if not self.tokenizer.is_fast:
            raise InputError(self.path, "its tokenizer gives no offsets", "use a model with a tokenizer.json")
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
        if not (self.tokenizer.is_fast and other.tokenizer.is_fast):
            return False
        settings = ("query_prompt", "passage_prompt", "query_length", "passage_length", "query_expansion")
        same = all(getattr(self, name) == getattr(other, name) for name in settings)
        return same and self.tokenizer.backend_tokenizer.to_str() == other.tokenizer.backend_tokenizer.to_str()

    def pairs(self, queries: Sequence[str], passages: Sequence[str]) -> Tokens:
        """Query i with passage i, in max_length tokens.

        Cross-encoders: the tokenizer's own pair, the longer text cut first. Decoder rerankers: the template, whose passage is
        cut; the question and the end of the prompt never are, so that only a question that alone is longer than max_length
        makes a longer row.
        """
        return self.padded(*self.pair_rows(queries, passages))

    def pair_rows(self, queries: Sequence[str], passages: Sequence[str]) -> tuple[Rows, Rows | None]:
        """The tokens and types of `pairs`, before they are padded."""
        if self.kind == "llm_reranker":
            return self._prompts(queries, passages), None
        first = [self.query_prompt + text for text in queries]
        return self._encode(first, [self.passage_prompt + text for text in passages], self.max_length)

    def ids(self, texts: Sequence[str], length: int | None) -> list[list[int]]:
        """The tokens of texts as they are, each read alone and cut to `length`; None: as part of a pair, whole.

        Raises InputError where a text alone has types that are not all 0: those would be lost.
        """
        alone = length is not None
        with self._lock:
            encoded = self.tokenizer(
                list(texts),
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
            encoded = self.tokenizer(
                texts,
                pairs,
                truncation="longest_first" if pairs else True,
                max_length=length,
                return_attention_mask=False,
                return_token_type_ids=self.token_types,
            )
            self._forget_truncation()
        return encoded["input_ids"], encoded.get("token_type_ids") if self.token_types else None

    def _prompts(self, queries: Sequence[str], passages: Sequence[str]) -> Rows:
        pieces = re.split(r"(\{(?:instruction|query|passage)\})", self.template)
        cut = pieces.index("{passage}")
        heads, bodies, texts = [], [], []
        for query, passage in zip(queries, passages, strict=True):
            filled = {
                "{instruction}": self.instruction,
                "{query}": self.query_prompt + query,
                "{passage}": self.passage_prompt + passage,
            }
            head, tail = ("".join(filled.get(x, x) for x in part) for part in (pieces[:cut], pieces[cut + 1 :]))
            heads.append(head)
            bodies.append(filled["{passage}"])
            texts.append(head + filled["{passage}"] + tail)
        with self._lock:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,  # the passage is cut below: no warning about its length
            )
        start = list(self.leading)
        rows = []
        for ids, offsets, head, body in zip(
            encoded["input_ids"], encoded["offset_mapping"], heads, bodies, strict=True
        ):
            excess = len(start) + len(ids) - self.max_length
            if excess > 0:
                # Tokens that lie in the passage alone: one that straddles its edge belongs to the prompt as well.
                first, last = len(head), len(head) + len(body)
                inside = [i for i, (a, b) in enumerate(offsets) if a >= first and b <= last and b > a]
                dropped = set(inside[-excess:])
                ids = [token for i, token in enumerate(ids) if i not in dropped]
            rows.append(start + ids)
        return rows

    def padded(self, rows: Rows, types: Rows | None, length: int = 0) -> Tokens:
        """Rows of tokens and of types, padded to the longest, or to `length`."""
        pad = self.tokenizer.pad_token_id
        # An empty text of a tokenizer that adds nothing: one token to attend to, or a softmax over nothing is NaN.
        rows = [row if len(row) else [pad] for row in rows]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        width = max(int(lengths.max()), length)
        mask = np.arange(width) < lengths[:, None]
        ids = np.full((len(rows), width), pad, np.int64)
        ids[mask] = np.concatenate(rows)
        tokens = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.token_types:
            table = np.zeros((len(rows), width), np.int64)
            if types is not None and any(len(row) for row in types):
                table[mask] = np.concatenate([row if len(row) else [0] for row in types])
            tokens["token_type_ids"] = torch.from_numpy(table)
        return tokens

    def _forget_truncation(self) -> None:
        # The tokenizer keeps the last call's truncation and would save it into the student's tokenizer.json.
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_truncation()


def _check_lengths(config: Any, kind: str, facts: ReadingFacts, max_length: int) -> None:
    if facts.positions is None:
        return
    lengths = {"query_length": config.query_length, "passage_length": config.passage_length}
    if kind in ("cross_encoder", "llm_reranker"):
        lengths = {"max_length": max_length}
    for name, length in lengths.items():
        if length > facts.positions:
            what = f"{name} is {length}, the model has {facts.positions} positions"
            raise InputError(config.path, what, f"set {name} to at most {facts.positions}")
