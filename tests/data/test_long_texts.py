"""Long texts are cut to characters before they are read, and their tokens stay those of the whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lead_ds.data.tokens import long_texts
from lead_ds.data.tokens.ids import ids_and_types
from lead_ds.data.tokens.long_texts import shortened, splits_at_spaces

KINDS = ["wordpiece", "unigram", "bpe"]
SOME = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Words, and what stands between words in the world: runs of spaces, lines, other spaces, marks that join, no text at all.
PIECES = ["octopus", "hunts", "Crabs,", "a1", "x", "é", "。", "--", " ", "  ", "\n", "\t", " \n "]
PIECES += ["\u3000", "\u00a0", "\u0301", "\u200b"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=200).map("".join) | st.lists(
    st.sampled_from(PIECES), max_size=120
).map(" ".join)


def whole(tokenizer: Any, texts: list[str], pairs: list[str] | None, length: int) -> list[list[int]]:
    return tokenizer(texts, pairs, truncation=True, max_length=length)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, min_size=2, max_size=2), length=st.integers(4, 20))
@SOME
def test_tokens_are_those_of_the_whole_text(
    tokenizer: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: str, texts: list[str], length: int
) -> None:
    monkeypatch.setattr(long_texts, "LONG", 30)
    reader = AutoTokenizer.from_pretrained(tokenizer(kind))
    assert splits_at_spaces(reader)
    assert ids_and_types(reader, texts, None, length, types=False)[0] == whole(reader, texts, None, length)
    swapped = texts[::-1]
    assert ids_and_types(reader, texts, swapped, length, types=False)[0] == whole(reader, texts, swapped, length)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_and_a_short_one_is_not(tokenizer: Callable[..., str], kind: str) -> None:
    reader = AutoTokenizer.from_pretrained(tokenizer(kind))
    text = "the octopus hunts crabs -- " * 60_000
    [found, short] = shortened(reader, [text, "the octopus"], 128)
    assert short == "the octopus"
    assert text.startswith(found)
    assert len(found) < 2_500
    assert whole(reader, [found], None, 128) == whole(reader, [text], None, 128)
    one_word = "-" * 50_000
    assert shortened(reader, [one_word], 128) == [one_word]


def test_who_does_not_read_words_apart_reads_the_whole(tokenizer: Callable[..., str]) -> None:
    left = AutoTokenizer.from_pretrained(tokenizer("wordpiece"), truncation_side="left")
    inner = Tokenizer(models.BPE())
    together = PreTrainedTokenizerFast(tokenizer_object=inner)
    text = "the octopus " * 10_000
    for reader in (left, together):
        assert shortened(reader, [text], 16) == [text]
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert splits_at_spaces(PreTrainedTokenizerFast(tokenizer_object=inner))
