"""Texts to token ids by a tokenizer of transformers: what every reader of texts asks most often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lead_ds.data.tokens.long_texts import shortened, shortened_pairs


def ids_and_types(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, length: int, *, types: bool
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids and, where `types`, token types of each text (or pair) in at most `length` tokens, special ones counted.

    The same as `tokenizer(texts, pairs, truncation=True, max_length=length)`, which also keeps where each token stands in its
    text: that and its bookkeeping take about as long as the tokens.
    """
    if pairs is None:
        texts = shortened(tokenizer, texts, length)
    else:
        texts, pairs = shortened_pairs(tokenizer, texts, pairs, length)
    if not _plain(tokenizer):
        given = {"truncation": True, "max_length": length, "return_attention_mask": False}
        encoded = tokenizer(list(texts), pairs and list(pairs), return_token_type_ids=types, **given)
        return encoded["input_ids"], encoded.get("token_type_ids") if types else None
    from transformers.tokenization_utils_base import TruncationStrategy
    from transformers.utils import PaddingStrategy

    tokenizer.set_truncation_and_padding(
        PaddingStrategy.DO_NOT_PAD, TruncationStrategy.LONGEST_FIRST, length, 0, None, None
    )
    inner = tokenizer.backend_tokenizer
    if inner.encode_special_tokens != tokenizer.split_special_tokens:
        inner.encode_special_tokens = tokenizer.split_special_tokens
    items: Sequence[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
    found = inner.encode_batch_fast(items)
    return [one.ids for one in found], [one.type_ids for one in found] if types else None


def _plain(tokenizer: Any) -> bool:
    """Whether it is one of tokenizers' that transformers calls as it is: some classes do more, before or afterwards."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    same = all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )
    return same and tokenizer.is_fast and not hasattr(tokenizer, "_switch_to_input_mode")
