"""A cross-encoder's tokens of a pair, out of the tokens of its two texts, where the tokenizer makes them so too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lead_ds.data.tokens.encoder import TextEncoder

Rows = list[np.ndarray]


@dataclass(frozen=True)
class PairForm:
    """What a tokenizer puts before, between and behind two texts, and the types it gives to all five; and the longest pair."""

    added: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    types: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None
    text_types: tuple[int, int]
    length: int

    @classmethod
    def of(cls, encoder: TextEncoder, probes: Sequence[tuple[str, str]]) -> PairForm | None:
        """The form of an encoder's pairs; None where `join` does not give each of `probes` the tokenizer's own tokens."""
        if encoder.template is not None or not encoder.tokenizer.is_fast:
            return None
        form = _form(encoder)
        if form is None:
            return None
        prompts = encoder.query_prompt, encoder.passage_prompt
        firsts, seconds = (
            [prompt + text for text in texts] for prompt, texts in zip(prompts, zip(*probes, strict=True), strict=True)
        )
        own = encoder.pair_rows([query for query, _ in probes], [passage for _, passage in probes])
        alone = ([np.array(row, np.int64) for row in encoder.ids(texts, None)] for texts in (firsts, seconds))
        joined = form.join(*alone)
        for mine, theirs in zip(joined, own, strict=True):
            if theirs is not None and any(list(a) != list(b) for a, b in zip(mine or [], theirs, strict=True)):
                return None
        return form

    def join(self, firsts: Sequence[np.ndarray], seconds: Sequence[np.ndarray]) -> tuple[Rows, Rows | None]:
        """Tokens of each pair, and their types. Each text is whole, without what is added to it."""
        before, between, behind = (np.array(ids, np.int64) for ids in self.added)
        room = self.length - sum(map(len, self.added))
        rows, types = [], []
        kinds = [np.array(ids, np.int64) for ids in self.types or ()]
        for first, second in zip(firsts, seconds, strict=True):
            a, b = longest_first(len(first), len(second), room)
            rows.append(np.concatenate([before, first[:a], between, second[:b], behind]))
            if kinds:
                mine = (np.full(count, kind) for count, kind in zip((a, b), self.text_types, strict=True))
                types.append(np.concatenate([kinds[0], next(mine), kinds[1], next(mine), kinds[2]]))
        return rows, types if kinds else None


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are left where `room` is for both: the longer is cut, to the other's length, then both.

    As Hugging Face's tokenizers cut with `longest_first`; of an odd number of tokens the second text gets the one more,
    or the first where it was the longer.
    """
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)


def _form(encoder: TextEncoder) -> PairForm | None:
    """Found by two texts that are one token each, and not the same one."""
    words = [(word, encoder.ids([word], None)[0]) for word in ("a", "b", "the", "of", "1", "2")]
    single = [(word, ids[0]) for word, ids in words if len(ids) == 1]
    if len(single) < 2 or single[0][1] == single[1][1]:
        return None
    (a, first), (b, second) = single[:2]
    with encoder.locked():
        found = encoder.tokenizer(a, b, return_token_type_ids=encoder.token_types)
    ids = found["input_ids"]
    if ids.count(first) != 1 or ids.count(second) != 1 or ids.index(first) > ids.index(second):
        return None
    cuts = ids.index(first), ids.index(second)
    pieces = [slice(0, cuts[0]), slice(cuts[0] + 1, cuts[1]), slice(cuts[1] + 1, None)]
    kinds = found["token_type_ids"] if encoder.token_types else None
    return PairForm(
        added=(tuple(ids[pieces[0]]), tuple(ids[pieces[1]]), tuple(ids[pieces[2]])),
        types=None if kinds is None else (tuple(kinds[pieces[0]]), tuple(kinds[pieces[1]]), tuple(kinds[pieces[2]])),
        text_types=(0, 0) if kinds is None else (kinds[cuts[0]], kinds[cuts[1]]),
        length=encoder.max_length,
    )
