"""Tiny models of many families with random weights, saved as Hugging Face directories with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.helpers.tiny import TokenizerKind, tiny_tokenizer

ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta", "electra", "mpnet", "deberta-v2", "modernbert")
DECODERS = ("llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")
FAMILIES = ENCODERS + DECODERS

_TOKENIZERS: dict[str, TokenizerKind] = {
    **dict.fromkeys(("roberta", "xlm-roberta"), "unigram"),
    **dict.fromkeys((*DECODERS, "eurobert", "lfm2", "modernbert-decoder", "qwen3_moe"), "bpe"),
    "cohere": "bpe",
    "granite": "bpe",
}
_CLASSES = {
    "base": transformers.AutoModel,
    "classifier": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
}


def tiny_config(family: str, *, layers: int = 3, labels: int = 1, vocab_size: int = 400, **more: Any) -> Any:
    """A transformers configuration of `family`, 32 wide."""
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 130,
        "num_labels": labels,
    }
    if family in ("roberta", "xlm-roberta"):
        shape |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    elif family == "mpnet":
        shape |= {"pad_token_id": 0}
    elif family == "modernbert":
        shape |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        shape |= {"local_attention": 8, "global_attn_every_n_layers": 2}
    elif family == "deberta-v2":
        shape |= {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
        shape |= {"norm_rel_ebd": "layer_norm", "pooler_hidden_size": 32, "type_vocab_size": 0}
    elif family in DECODERS or family in ("cohere", "granite"):
        shape |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
        if family in ("gemma2", "gemma3_text", "mistral"):
            shape |= {"sliding_window": 8}
        if family in ("gemma2", "gemma3_text"):
            shape |= {"query_pre_attn_scalar": 8}
        if family == "gemma2":
            shape |= {"final_logit_softcapping": 2.0}
        if family in ("granite", "cohere"):
            shape.pop("head_dim")
            shape |= {"logits_scaling": 4.0} if family == "granite" else {"logit_scale": 0.25}
    return transformers.AutoConfig.for_model(family, **(shape | more))


def tiny_model(folder: Path, family: str, head: str = "base", *, seed: int = 0, **shape: Any) -> str:
    """Save a random model with its tokenizer and return its path. `head`: base, classifier, causal or masked."""
    tokenizer = tiny_tokenizer(folder, _TOKENIZERS.get(family, "wordpiece"))
    size = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    torch.manual_seed(seed)
    model = _CLASSES[head].from_config(tiny_config(family, vocab_size=size, **shape))
    with torch.no_grad():
        for parameter in model.parameters():  # norms that are the identity, biases that are zero would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def tokens_of(
    lengths: Sequence[int], *, width: int | None = None, side: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Random texts of given lengths, padded to `width` on `side`; the same texts for the same seed and lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        text = torch.randint(10, 200, (length,), generator=generator)
        span = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, span], mask[row, span] = text, 1
    return {"input_ids": ids, "attention_mask": mask}
