"""Texts far longer than a model reads are cut to characters first: a tokenizer reads all of a text before it cuts its tokens.

The tokens stay the same. Where a tokenizer splits at spaces before anything else, what stands behind a space does not change
the tokens of the words before it, but for the last. A word with an ASCII letter or digit is one token at least. So the first
`words` of them hold the first `words` - 1 tokens of the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

LONG = 16_384  # characters, from which on it is worth a look
_WORD = re.compile("[0-9A-Za-z]")
_EDGE = re.compile("(?<=[0-9A-Za-z]) (?=[0-9A-Za-z])")
_LOCAL = {  # normalizers that read a character and those beside it
    *(
        "BertNormalizer",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Lowercase",
        "StripAccents",
        "Strip",
        "Prepend",
        "Precompiled",
    ),
}
_SPLITS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
# The patterns of byte-level tokenizers since GPT-2 end so. What they match before holds no space but a first one.
_BYTE_LEVEL = (r"|\s+(?!\S)|\s+", r"|\s+(?!\S)")


def shortened(tokenizer: Any, texts: Sequence[str], length: int) -> Sequence[str]:
    """Texts of which the first `length` tokens are those of the given ones; those that are not long, as they are."""
    long = any(len(text) > LONG for text in texts)
    if not long or not splits_at_spaces(tokenizer) or not _cuts(tokenizer, length, False):
        return texts
    return [_first_words(text, 2 * length + 16) if len(text) > LONG else text for text in texts]


def shortened_pairs(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str], length: int
) -> tuple[Sequence[str], Sequence[str]]:
    """The same of pairs whose longer text is cut first: it stays the longer one, by more tokens than the other has bytes.

    Where both are long for `length`, their tokens are counted, for the longer one is given the odd token. What no space parts
    is cut where its tokens stay the same. Tokenizers join every piece that they cut off one text with every piece of
    the other: of two texts of 16 kB that takes seconds and 1 GB.
    """
    apart = 8 * length  # characters

    def long(first: str, second: str) -> bool:
        return len(first) > LONG or len(second) > LONG or min(len(first), len(second)) > apart

    if not any(map(long, texts, pairs)) or not splits_at_spaces(tokenizer) or not _cuts(tokenizer, length, True):
        return texts, pairs
    counts: dict[str, int] = {}
    tokenizer.backend_tokenizer.no_truncation()  # of an earlier call, or of its file

    def tokens(text: str) -> int:
        if text not in counts:  # a query stands beside many passages
            counts[text] = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))
        return counts[text]

    both, words = [list(texts), list(pairs)], 2 * length + 16
    for row, pair in enumerate(zip(texts, pairs, strict=True)):
        if not long(*pair):
            continue
        counted = min(map(len, pair)) > apart
        first, second = map(tokens, pair) if counted else map(len, pair)
        longer, shorter = (0, 1) if first > second else (1, 0)
        if counted:
            both[shorter][row] = _first_tokens(tokenizer, _first_words(pair[shorter], words), length)
        more = tokens(both[shorter][row]) if counted else 4 * len(pair[shorter])
        both[longer][row] = _first_words(pair[longer], words + more)
        if counted:
            both[longer][row] = _first_tokens(tokenizer, both[longer][row], length + more)
    return both[0], both[1]


def without_middles(tokenizer: Any, texts: Sequence[str], length: int) -> Sequence[str]:
    """Texts whose first `length` tokens and whose last words are those of the given ones: what a template may be put around."""
    if all(len(text) <= LONG for text in texts) or not splits_at_spaces(tokenizer):
        return texts
    return [_both_ends(text, 2 * length + 16) if len(text) > LONG else text for text in texts]


def splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer is known to read each word apart, and to cut on the right."""
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return False
    inner = tokenizer.backend_tokenizer
    normalizers, splits = _steps(inner.normalizer), _steps(inner.pre_tokenizer)
    return all(map(_is_local, normalizers)) and any(map(_splits, splits[:1]))


def _cuts(tokenizer: Any, length: int, pair: bool) -> bool:
    """Whether a tokenizer cuts at all: not where its special tokens alone are longer."""
    return length > tokenizer.num_special_tokens_to_add(pair)


def _first_words(text: str, words: int) -> str:
    start = 0
    while words:
        end = text.find(" ", start)
        if end < 0:
            return text
        words -= _WORD.search(text, start, end) is not None
        start = end + 1
    return text[: start - 1]


def _first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The start of a text that is seen to have its first `count` tokens, and more: for texts without spaces."""
    whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    if len(whole.ids) <= 2 * count:
        return text
    start = text[: whole.offsets[2 * count - 1][1]]
    ids = tokenizer.backend_tokenizer.encode(start, add_special_tokens=False).ids
    return start if ids[:count] == whole.ids[:count] else text


def _both_ends(text: str, words: int) -> str:
    """The first words and the last one. Between two words of ASCII letters or digits, one space is where both were parted."""
    head = len(_first_words(text, words))
    start = _EDGE.search(text, head)
    end = text.rfind(" ")
    while start is not None and end > start.start():
        if _EDGE.match(text, end):
            return text[: start.start()] + text[end:]
        end = text.rfind(" ", 0, end)
    return text


def _steps(part: Any) -> list[dict[str, Any]]:
    """A tokenizer's normalizer or pre-tokenizer, as the steps that it consists of."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return list(state.get("normalizers") or state.get("pretokenizers") or [state])


def _is_local(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step["pattern"]
        return "String" in pattern or pattern == {"Regex": " {2,}"}
    return step["type"] in _LOCAL


def _splits(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("split", True))
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] == "Split":
        pattern = step["pattern"].get("Regex", "")
        return (
            pattern.endswith(_BYTE_LEVEL)
            and pattern.count("(?!") == 1
            and "(?=" not in pattern
            and "(?<" not in pattern
        )
    return step["type"] in _SPLITS
