"""Token ids without places: those of transformers' own call, and its own call where a class does more."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lead_ds.data.tokens.ids import ids_and_types

TEXTS = ["which thing hunts crabs at night", "octopus", "", "The [SEP] clock <s> é 漢字 \u3000 a" * 9, "x" * 500]
OTHERS = ["The octopus hunts crabs at night. People wrote about this.", "", "clock", "[MASK] it", "y z " * 200]


@pytest.mark.parametrize("length", [3, 8, 64])
@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe"])
def test_ids_and_types_are_those_of_the_tokenizers_own_call(
    tokenizer: Callable[..., str], kind: str, length: int
) -> None:
    own, ours = (AutoTokenizer.from_pretrained(tokenizer(kind)) for _ in range(2))
    for split in (False, True):
        own.split_special_tokens = ours.split_special_tokens = split
        for pairs in (None, OTHERS):
            wanted = own(TEXTS, pairs, truncation=True, max_length=length, return_token_type_ids=True)
            found = ids_and_types(ours, TEXTS, pairs, length, types=True)
            assert found == (wanted["input_ids"], wanted["token_type_ids"])
            assert ids_and_types(ours, TEXTS, pairs, length, types=False) == (wanted["input_ids"], None)


def test_left_truncation_and_a_file_that_pads_are_as_the_tokenizers_own_call(tokenizer: Callable[..., str]) -> None:
    own, ours = (AutoTokenizer.from_pretrained(tokenizer("wordpiece"), truncation_side="left") for _ in range(2))
    ours.backend_tokenizer.enable_padding(length=99)
    ours.backend_tokenizer.enable_truncation(5)
    wanted = own(TEXTS, truncation=True, max_length=9, return_token_type_ids=True)["input_ids"]
    assert ids_and_types(ours, TEXTS, None, 9, types=False) == (wanted, None)


class Marked(PreTrainedTokenizerFast):
    """A class whose call does more than its tokenizer."""

    def __call__(self, *given: Any, **how: Any) -> Any:
        found = super().__call__(*given, **how)
        found["input_ids"] = [[7, *ids] for ids in found["input_ids"]]
        return found


def test_a_class_that_does_more_is_called_itself(tokenizer: Callable[..., str]) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer("wordpiece"))
    marked = Marked(tokenizer_object=plain.backend_tokenizer)
    wanted = [[7, *ids] for ids in ids_and_types(plain, TEXTS, None, 8, types=False)[0]]
    assert ids_and_types(marked, TEXTS, None, 8, types=False)[0] == wanted
