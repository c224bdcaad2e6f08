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
    if all(len(text) <= LONG for text in texts) or not splits_at_spaces(tokenizer):
        return texts
    return [_first_words(text, 2 * length + 16) for text in texts]


def shortened_pairs(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str], length: int
) -> tuple[Sequence[str], Sequence[str]]:
    """The same of pairs whose longer text is cut first: it stays the longer one, by more tokens than the other has bytes."""
    if all(len(text) <= LONG for text in (*texts, *pairs)) or not splits_at_spaces(tokenizer):
        return texts, pairs
    both = [list(texts), list(pairs)]
    for row, pair in enumerate(zip(texts, pairs, strict=True)):
        longer = 0 if len(pair[0]) > len(pair[1]) else 1
        words = 2 * length + 16 + 4 * len(pair[1 - longer])
        both[longer][row] = _first_words(pair[longer], words)
    return both[0], both[1]


def splits_at_spaces(tokenizer: Any) -> bool:
    """Whether a tokenizer is known to read each word apart, and to cut on the right."""
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return False
    inner = tokenizer.backend_tokenizer
    normalizers, splits = _steps(inner.normalizer), _steps(inner.pre_tokenizer)
    return all(map(_is_local, normalizers)) and any(map(_splits, splits[:1]))


def _first_words(text: str, words: int) -> str:
    if len(text) <= LONG:
        return text
    start = 0
    while words:
        end = text.find(" ", start)
        if end < 0:
            return text
        words -= _WORD.search(text, start, end) is not None
        start = end + 1
    return text[: start - 1]


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
