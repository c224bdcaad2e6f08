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
from lead_ds.data.tokens.long_texts import shortened, shortened_pairs, splits_at_spaces, without_middles
from lead_ds.data.tokens.pair_templates import Filled
from lead_ds.data.tokens.pairs import longest_first

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
@given(texts=st.lists(TEXTS, min_size=2, max_size=2), length=st.integers(2, 20))
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
@pytest.mark.parametrize("template", ["Q:{query}\nP:{passage}\nyes or no", "{passage}{query}?"])
@given(texts=st.lists(TEXTS, min_size=2, max_size=2), length=st.integers(16, 40))
@settings(SOME, max_examples=60)
def test_a_template_reads_the_same_of_them(
    tokenizer: Callable[..., str], kind: str, template: str, texts: list[str], length: int
) -> None:
    reader = AutoTokenizer.from_pretrained(tokenizer(kind))
    prompt = Filled(template)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(long_texts, "LONG", 30)
        found = prompt.rows(reader, texts[:1], texts[1:], length)
    assert found == prompt.rows(reader, texts[:1], texts[1:], length)


@pytest.mark.parametrize("kind", KINDS)
def test_both_texts_of_a_pair_may_be_long(tokenizer: Callable[..., str], kind: str) -> None:
    reader = AutoTokenizer.from_pretrained(tokenizer(kind))
    long, longer = "the octopus hunts crabs -- " * 400, "crabs, the octopus -- " * 600
    for texts in ([long, longer], [longer, long], [long, long]):
        for length in (64, 65):
            first, second = shortened_pairs(reader, texts[:1], texts[1:], length)
            assert len(first[0]) + len(second[0]) < 8_000
            reader.backend_tokenizer.no_truncation()
            rows = [reader.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            room = length - reader.num_special_tokens_to_add(pair=True)
            left = longest_first(len(rows[0]), len(rows[1]), room)
            [found] = ids_and_types(reader, texts[:1], texts[1:], length, types=False)[0]
            reader.backend_tokenizer.no_truncation()
            added = reader.backend_tokenizer.encode("", "").ids
            assert [token for token in found if token not in added] == rows[0][: left[0]] + rows[1][: left[1]]
    for texts in (["章魚有三顆心臟" * 600, "crab" * 1500], ["-" * 5000, "、。" * 2600], ["a。" * 3000, "a。" * 3000]):
        for length in (64, 65):
            first, second = shortened_pairs(reader, texts[:1], texts[1:], length)
            reader.backend_tokenizer.no_truncation()
            assert len(reader.backend_tokenizer.encode(first[0], second[0]).ids) < 12 * length
            kept = whole(reader, texts[:1], texts[1:], length)
            assert ids_and_types(reader, texts[:1], texts[1:], length, types=False)[0] == kept
    [ends] = without_middles(reader, [longer * 4], 32)
    assert len(ends) < 2_500
    assert ends.endswith("octopus -- ")


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
