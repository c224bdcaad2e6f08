"""How a model is read, as facts: its kind and why, structure, prompts, lengths, similarity, tokens, and what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.io.located import find_file
from lead_ds.models.as_read import check_room, reading_of
from lead_ds.models.dtypes import weight_dtypes
from lead_ds.models.files import RECORD, family_of, read_json
from lead_ds.models.inventory import unread
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.load import LENGTHS, load_scorer, named_kind
from lead_ds.models.merging import adapter_facts, merge_adapter
from lead_ds.models.vocabulary import check_weights, tokens_beyond
from lead_ds.settings.parse import apply_override

_DTYPES = {"BF16": "bf16", "F16": "fp16"}


@dataclass(frozen=True)
class Inspected:
    """A model as it was read, and plain facts about that: what JSON can hold."""

    scorer: Kind
    encoder: TextEncoder
    facts: dict[str, Any]


def inspect_model(path: str, settings: Sequence[str] = (), kind: str | None = None) -> Inspected:
    """Read a model as `evaluate` does, on the CPU and in the dtype of its weights, and say how it was read.

    settings: `key=value` of its kind's section. kind: None: what its files say.
    Raises InputError where a run would refuse the model, in the same words.
    """
    named = kind is not None or any(setting.partition("=")[0].strip() == "kind" for setting in settings)
    why = "settings" if named else kind_reason(path)
    name, settings = named_kind(path, settings, kind)
    allowed = {key: f"{key}=true" in settings for key in ("trust_remote_code", "allow_pickle")}
    merge_adapter(path, **allowed)
    saved = weight_dtypes(path)
    own = _DTYPES.get(saved[0], "fp32") if len(saved) == 1 else "fp32"
    scorer, encoder = load_scorer(path, name, [f"dtype={own}", *settings])
    check_room(encoder, "")
    check_weights(scorer, encoder, path)
    given: dict[str, Any] = {}
    for setting in settings:
        apply_override(given, setting, scorer.Settings)
    shape = scorer.model.config
    facts = {
        "path": path,
        "kind_from": why,
        "architecture": (shape.architectures or [type(scorer.model).__name__])[0],
        "adapter": adapter_facts(path),
        "layers": scorer.num_layers,
        "width": scorer.width,
        "parameters": sum(p.numel() for p in scorer.parameters()),
        "weights": saved or ["unknown: they come as pickle"],
        "modules": [_described(module) for module in scorer.behind],
        "vector_width": None if scorer.reads_pairs else scorer.features_width,
        **reading_of(scorer, encoder),
        "lengths": _lengths(scorer, encoder, given),
        "files_length": encoder.longest,
        "positions": getattr(shape.get_text_config(), "max_position_embeddings", None),
        "tokenizer": _tokenizer(encoder),
        "can_be_student": scorer.can_be_student,
        "can_be_trained": scorer.can_be_trained,
    }
    facts["notes"] = _notes(scorer, encoder, facts)
    return Inspected(scorer, encoder, facts)


def kind_reason(path: str) -> str:
    """What in a model's files says of which kind it is."""
    if read_json(path, RECORD).get("kind"):
        return RECORD
    family = family_of(path)
    if family is not None:
        said = read_json(path, "config_sentence_transformers.json").get("model_type") is not None
        named = "config_sentence_transformers.json" if said else "modules.json"
        file = named if find_file(path, named) is not None else "config.json"
        return f"{file}: {family} of sentence-transformers"
    names = read_json(path, "config.json").get("architectures") or ["no architecture"]
    return f"config.json: {names[0]}"


def shown(encoder: TextEncoder, query: str, passage: str) -> dict[str, list[tuple[str, str]]]:
    """(token, role) of a query and a passage, or of the pair that they make. role: special, prompt, text or expansion."""
    if encoder.reads_pairs:
        row = encoder.pairs([query], [passage])["input_ids"][0].tolist()
        return {"pair": _with_roles(encoder, row, None)}
    return {
        "query": _with_roles(encoder, encoder.queries([query])["input_ids"][0].tolist(), ("queries", query)),
        "passage": _with_roles(encoder, encoder.passages([passage])["input_ids"][0].tolist(), ("passages", passage)),
    }


def _with_roles(
    encoder: TextEncoder, row: list[int], text: tuple[Literal["queries", "passages"], str] | None
) -> list[tuple[str, str]]:
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    roles = ["special" if token in special else "text" for token in row]
    if text is not None and tokenizer.is_fast and encoder.message is None:
        (spans,), begin = encoder.spans([text[1]], text[0])
        for i, (start, end) in enumerate(spans[: len(row)]):
            if end > start:  # special tokens stand for no characters
                roles[i] = "prompt" if end <= begin else "text"
        roles[len(spans) :] = ["expansion"] * (len(row) - len(spans))
    return list(zip(map(str, tokenizer.convert_ids_to_tokens(row)), roles, strict=True))


def _described(module: Any) -> str:
    name = type(module).__name__
    if hasattr(module, "pooling_mode"):
        return f"{name} ({module.pooling_mode})"
    if hasattr(module, "out_features"):
        activation = type(module.activation_function).__name__
        return f"{name} ({module.in_features} to {module.out_features}, {activation})"
    return name


def _lengths(scorer: Kind, encoder: TextEncoder, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each length that the kind reads, and where it comes from."""
    record = read_json(encoder.path, RECORD)
    found: dict[str, dict[str, Any]] = {}
    for name in LENGTHS:
        if name in scorer.Settings.model_fields:
            tokens = getattr(encoder, name)
            recorded = tokens in (record.get(key) for key in LENGTHS)
            source = "settings" if given.get(name) == tokens else RECORD if recorded else "the model's files"
            found[name] = {"tokens": tokens, "from": source}
    return found


def _tokenizer(encoder: TextEncoder) -> dict[str, Any]:
    tokenizer = encoder.tokenizer
    return {
        "class": type(tokenizer).__name__,
        "fast": bool(tokenizer.is_fast),
        "vocabulary": len(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    }


def _notes(scorer: Kind, encoder: TextEncoder, facts: dict[str, Any]) -> list[str]:
    """What a reader would not expect."""
    notes: list[str] = []
    files = facts["files_length"]
    for name, length in facts["lengths"].items():
        tokens = length["tokens"]
        if files is not None and tokens < files:
            notes.append(f"{name}: {tokens} tokens here, its files say {files}; set {name}={files} to read as much")
    unknown = unread(encoder.path, scorer.model.config) if facts["architecture"] != "StaticModel" else []
    if unknown:
        notes.append(f"config.json: {', '.join(unknown)}: read by no part of a {scorer.model.config.model_type} here")
    if facts["adapter"] is not None and facts["weights"] != ["F32"]:
        notes.append("adapter: merged in its base's precision, to which the update is rounded; peft adds it in float32")
    if facts["pooling"] is not None and family_of(encoder.path) is None:
        notes.append(f"pooling: no file names one; {facts['pooling']} is taken")
    if beyond := tokens_beyond(scorer, encoder):
        first = min(beyond, key=beyond.__getitem__)
        notes.append(
            f"tokenizer: {len(beyond)} of its tokens have no embedding, from {first!r} on: no text may hold them"
        )
    return notes
