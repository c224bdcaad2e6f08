"""What a model's own files say about reading text: its prompts, its pooling, the longest text it can take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lead_ds.errors import InputError
from lead_ds.io.hub import find_file, hub_settings

# Absolute positions of these families start after the padding index: two fewer tokens fit than the table has rows.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")
_COLBERT_QUERY, _COLBERT_PASSAGE = "query_prefix", "document_prefix"  # PyLate's names
RECORD = "lead_ds.json"  # what this project adds to a model's directory: kind, lengths, scale, prompts of pairs


@dataclass(frozen=True)
class ReadingFacts:
    """Facts of a model that its tokenizer alone does not tell; None where its files do not say."""

    subfolder: str = ""  # of the tokenizer, in a sentence-transformers directory
    query_prompt: str | None = None
    passage_prompt: str | None = None
    last_pooling: bool = False  # by modules.json, else a decoder
    token_types: bool | None = None  # whether the model tells the two texts of a pair apart by them
    positions: int | None = None
    query_expansion: bool = False  # PyLate's do_query_expansion
    mask_punctuation: bool = False  # PyLate's skiplist_words


def reading_facts(path: str, trust_remote_code: bool = False) -> ReadingFacts:
    """Read the facts from a local directory or a hub repository. Raises InputError for JSON that cannot be read."""
    own = _json(path, "config_sentence_transformers.json") or {}
    prompts = own.get("prompts") or (_json(path, RECORD) or {}).get("prompts") or {}
    subfolder, pooling = _modules(path)
    config = _model_config(path, subfolder, trust_remote_code)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and config.model_type in _OFFSET_POSITIONS:
        positions -= 2
    return ReadingFacts(
        subfolder=subfolder,
        query_prompt=prompts.get("query") or own.get(_COLBERT_QUERY),
        passage_prompt=prompts.get("document") or prompts.get("passage") or own.get(_COLBERT_PASSAGE),
        last_pooling=pooling == "last" if pooling else _is_decoder(config),
        token_types=None if config is None else (getattr(config, "type_vocab_size", 0) or 0) > 1,
        positions=positions if isinstance(positions, int) and positions > 0 else None,
        query_expansion=bool(own.get("do_query_expansion")),
        mask_punctuation=bool(own.get("skiplist_words")),
    )


def _json(path: str, name: str) -> Any:
    file = find_file(path, name)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, f"not readable as JSON: {error}", "restore the model's file") from None


def _modules(path: str) -> tuple[str, str | None]:
    """The transformer's subfolder and whether pooling is "last", by modules.json."""
    subfolder, pooling = "", None
    for module in _json(path, "modules.json") or []:
        kind, where = str(module.get("type", "")).rsplit(".", 1)[-1], str(module.get("path", ""))
        if kind == "Transformer":
            subfolder = where
        elif kind == "Pooling":
            tree = _json(path, f"{where}/config.json" if where else "config.json") or {}
            last = tree.get("pooling_mode") == "lasttoken" or bool(tree.get("pooling_mode_lasttoken"))
            pooling = "last" if last else "other"
    return subfolder, pooling


def _model_config(path: str, subfolder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            path, subfolder=subfolder, trust_remote_code=trust_remote_code, **hub_settings(path)
        )
    except Exception:  # whatever is wrong with it, loading the model tells; the tokenizer may do without
        return None


def _is_decoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = getattr(config, "model_type", None)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
