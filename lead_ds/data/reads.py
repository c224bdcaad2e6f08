"""What models are given of groups: tokens of their texts, or what answers in a model's place.

Dimensions: N passages per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.groups.group import Group
from lead_ds.data.tokens.cache import TokenCache
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.passes import Cuts, Fewest, Passes, even, in_passes, least_padding, packed
from lead_ds.errors import InputError
from lead_ds.settings.roles import Span

# Tokens of a pass. What a GPU needs is a guess: launching the kernels of a small model takes as long as running so many.
LEAST = {"cpu": 256, "cuda": 8192}


@dataclass
class ModelBatch:
    """What one model reads of some consecutive groups; query i's passages are rows i*N to i*N + N-1, the positive first."""

    group_size: int  # N
    queries: Tokens | None = None
    passages: Tokens | None = None
    pairs: Tokens | None = None  # instead of both, for models that read a query with a passage
    looked_up: Tokens | None = None  # instead of all, what is known of the groups without a model: see Lookup
    passes: Passes | None = None  # the rows of queries, then of passages, or of pairs: as the model is to run them

    @property
    def tables(self) -> list[Tokens]:
        """The texts of queries and of passages, or of pairs."""
        return [tokens for tokens in (self.queries, self.passages, self.pairs) if tokens is not None]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ModelBatch:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ModelBatch:
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelBatch:
        parts = {name: getattr(self, name) for name in ("queries", "passages", "pairs", "looked_up")}
        changed = {
            name: None if tokens is None else {key: change(tensor) for key, tensor in tokens.items()}
            for name, tokens in parts.items()
        }
        return ModelBatch(self.group_size, **changed, passes=None if self.passes is None else self.passes.map(change))


class Lookup(Protocol):
    """What is known of groups without a model that reads them. Picklable: worker processes look it up."""

    reads_texts: bool  # whether it looks at the texts of groups, and not only at their keys

    def read(self, rows: np.ndarray, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """Arrays by name of some groups, and of the rows that they were drawn from. Raises InputError for what is absent."""
        ...


@dataclass(frozen=True)
class Reads:
    """What one model is given of groups: tokens of their texts by `encoder`, or what `lookup` finds. Picklable."""

    encoder: TextEncoder | None = None
    lookup: Lookup | None = None
    at_once: int | None = None  # groups of a batch; None: all of a window
    passes: int | Literal["packed"] | Fewest | None = None
    queries_at_once: int | None = None  # with GradCache
    queries_alone: bool = False  # passages are another model's
    by_words: bool = False  # its attention is compared with the student's, by the words that both see
    tokens: TokenCache | None = None
    span: Span = Span()  # noqa: RUF009  # immutable; the steps at which it is read in training

    @property
    def reads_texts(self) -> bool:
        """Whether groups must carry their texts."""
        if self.lookup is not None:
            return self.lookup.reads_texts
        return self.tokens is None

    @property
    def replicated(self) -> Reads:
        """The same of a model that turned out not to be sharded."""
        return replace(self, passes=replace(self.passes, sharded=False)) if isinstance(self.passes, Fewest) else self

    @property
    def texts_apart(self) -> bool:
        """Whether it reads queries and passages apart, and not as pairs."""
        return self.encoder is not None and not self.encoder.reads_pairs

    def batches(self, rows: np.ndarray, groups: Sequence[Group]) -> list[ModelBatch]:
        """What it is given of groups, drawn from `rows`: in batches of whole groups, or all at once what is not tokens."""
        size = len(groups[0].keys)
        if self.lookup is not None:
            arrays = self.lookup.read(rows, groups)
            return [ModelBatch(size, looked_up={name: torch.from_numpy(array) for name, array in arrays.items()})]
        return [self._tokens(part) for part in in_parts(groups, self.at_once or len(groups))]

    def _tokens(self, groups: Sequence[Group]) -> ModelBatch:
        assert self.encoder is not None
        size = len(groups[0].keys)
        if self.tokens is not None:
            batch = ModelBatch(size, **self.tokens.read(groups))
        elif self.queries_alone:
            batch = ModelBatch(size, queries=self.encoder.queries([group.query for group in groups]))
        else:
            batch = read(self.encoder, groups)
        if self.queries_alone:
            batch = replace(batch, passages=None)
        if self.queries_at_once is not None:
            return split(batch, self.encoder, -(-len(groups) // self.queries_at_once), even)
        if self.passes == "packed":
            return pack(batch, self.encoder)
        n = self.passes.of(batch.tables) if isinstance(self.passes, Fewest) else self.passes
        return batch if n is None else split(batch, self.encoder, n, least_padding)


def passes_of(
    setting: int | Literal["auto", "packed"] | None, *, sharded: bool, tapped: bool, device: torch.device
) -> int | Literal["packed"] | Fewest | None:
    """What `passes` of a model's settings means for its `Reads`. tapped: its attention maps are read, which come whole."""
    if setting != "auto":
        return setting
    return None if tapped else Fewest(sharded, LEAST.get(device.type, LEAST["cuda"]))


def read(encoder: TextEncoder, groups: Sequence[Group]) -> ModelBatch:
    """What a model of the encoder's kind reads of some groups; of texts alone, each as its role says, as passages."""
    if groups[0].role is not None:
        texts, asking = [group.passages[0] for group in groups], [group.role == "query" for group in groups]
        return ModelBatch(1, passages=encoder.alone(texts, asking))
    queries = [group.query for group in groups]
    passages = [passage for group in groups for passage in group.passages]
    size = len(passages) // len(queries)
    if encoder.reads_pairs:
        return ModelBatch(size, pairs=encoder.pairs([query for query in queries for _ in range(size)], passages))
    return ModelBatch(size, queries=encoder.queries(queries), passages=encoder.passages(passages))


def refuse_voided(encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str], where: str) -> None:
    """Raise InputError where every query, or every passage, of these would be read the same, whatever its words.

    where: whose lengths these are. A length that the prompt or the instruction fills is enough: every text behind it is cut
    away, and no loss or score shows it.
    """
    queries, passages = list(dict.fromkeys(queries)), list(dict.fromkeys(passages))
    pairs = encoder.reads_pairs
    if pairs and not (queries and passages):
        return
    for kind, texts in (("queries", queries), ("passages", passages)):
        if len(texts) < 2:
            continue
        if not pairs:
            rows, _ = encoder.rows(texts, "queries" if kind == "queries" else "passages")
        elif kind == "queries":
            rows, _ = encoder.pair_rows(texts, passages[:1] * len(texts))
        else:
            rows, _ = encoder.pair_rows(queries[:1] * len(texts), texts)
        if all(list(row) == list(rows[0]) for row in rows):
            length = "max_length" if pairs else "query_length" if kind == "queries" else "passage_length"
            limit = getattr(encoder, length)
            if len(rows[0]) < limit:  # none was cut
                what = f"reads all {kind} that were looked at the same, first {texts[0][:60]!r} and {texts[1][:60]!r}"
                raise InputError(
                    encoder.path, what, "its tokenizer does not know their words: use a model of their language"
                )
            what = f"is {limit}, and all {kind} that were looked at read the same: nothing is left of their texts"
            key = ".".join(filter(None, [where, length]))
            raise InputError(key, what, "raise it, or shorten the prompt, the instruction or the template")


def refuse_equal(groups: Sequence[Group], path: Path) -> None:
    """Raise InputError where these groups of `path` have one query, one passage, or each the same text as all its passages."""
    if len(groups) < 2:
        return
    texts = [{*group.passages} for group in groups]
    if len({group.query for group in groups}) == 1:
        what = "have the same query"
    elif len(set().union(*texts)) == 1:
        what = "have one and the same passage"
    elif len(groups[0].passages) > 1 and all(len(own) == 1 for own in texts):
        what = "have one text as their positive and all their negatives"
    else:
        return
    raise InputError(path, f"{len(groups)} groups, taken from all over it, {what}", "check what wrote the file")


def split(batch: ModelBatch, encoder: TextEncoder, n: int, cuts: Cuts) -> ModelBatch:
    """The batch with its rows in n passes."""
    return replace(batch, passes=in_passes(batch.tables, n, cuts, encoder.tokenizer.pad_token_id))


def pack(batch: ModelBatch, encoder: TextEncoder) -> ModelBatch:
    """The batch with its rows in one packed pass."""
    return replace(batch, passes=packed(batch.tables, encoder.tokenizer.pad_token_id))


def in_parts(groups: Sequence[Group], size: int) -> Iterator[Sequence[Group]]:
    """`size` groups after another."""
    for first in range(0, len(groups), size):
        yield groups[first : first + size]
