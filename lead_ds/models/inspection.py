"""How a model is read, as facts: its kind and why, structure, prompts, lengths, similarity, tokens, and what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.io.located import find_file
from lead_ds.models.files import RECORD, family_of, read_json, transformer_folder
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.models.load import kind_of, load_scorer
from lead_ds.models.merging import adapter_facts, merge_adapter
from lead_ds.settings.parse import apply_override, parse_section

_WHOLE = 1 << 30  # longer than any text: nothing is cut
_FEW = 8  # tokens of a text that a prompt must leave
_DTYPES = {"BF16": "bf16", "F16": "fp16"}
_LENGTHS = ("query_length", "passage_length", "max_length")


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
    why = "--kind" if kind is not None else kind_reason(path)
    name = kind or kind_of(path)
    allowed = {key: f"{key}=true" in settings for key in ("trust_remote_code", "allow_pickle")}
    merge_adapter(path, **allowed)
    saved = weight_dtypes(path)
    own = _DTYPES.get(saved[0], "fp32") if len(saved) == 1 else "fp32"
    scorer, encoder = load_scorer(path, name, [f"dtype={own}", *settings])
    given: dict[str, Any] = {}
    for setting in settings:
        apply_override(given, setting, scorer.Settings)
    shape = scorer.model.config
    facts = {
        "path": path,
        "kind": scorer.name,
        "kind_from": why,
        "architecture": (shape.architectures or [type(scorer.model).__name__])[0],
        "adapter": adapter_facts(path),
        "layers": scorer.num_layers,
        "width": scorer.width,
        "parameters": sum(p.numel() for p in scorer.parameters()),
        "weights": saved or ["unknown: they come as pickle"],
        "read_as": scorer.config.dtype,
        "modules": [_described(module) for module in scorer.behind],
        "pooling": getattr(scorer, "pooling", None),
        "normalize": getattr(scorer, "normalize", None),
        "vector_width": None if scorer.reads_pairs else scorer.features_width,
        "prompts": {"query": encoder.query_prompt, "passage": encoder.passage_prompt},
        "template": None if encoder.layout is None else str(encoder.layout),
        "lengths": _lengths(scorer, encoder, given),
        "files_length": encoder.longest,
        "positions": getattr(shape.get_text_config(), "max_position_embeddings", None),
        "similarity": _similarity(scorer),
        "tokenizer": _tokenizer(encoder),
        "in_a_run": _in_a_run(scorer, given),
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


def weight_dtypes(path: str) -> list[str]:
    """The dtypes of a model's saved weights, by safetensors' names, without reading them; empty where they are pickled."""
    from safetensors import SafetensorError, safe_open

    folder = transformer_folder(path)
    prefix = f"{folder}/" if folder else ""
    shards = read_json(path, f"{prefix}model.safetensors.index.json").get("weight_map") or {"": "model.safetensors"}
    found: set[str] = set()
    for name in sorted(set(shards.values())):
        file = find_file(path, prefix + name)
        if file is None:
            continue
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {str(weights.get_slice(key).get_dtype()) for key in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(file, f"damaged weights: {error}") from error
    return sorted(found)


def shown(encoder: TextEncoder, query: str, passage: str) -> dict[str, list[tuple[str, str]]]:
    """(token, role) of a query and a passage, or of the pair that they make. role: special, prompt, text or expansion."""
    if encoder.reads_pairs:
        row = encoder.pairs([query], [passage])["input_ids"][0].tolist()
        return {"pair": _with_roles(encoder, row, None)}
    return {
        "query": _with_roles(encoder, encoder.queries([query])["input_ids"][0].tolist(), ("queries", query)),
        "passage": _with_roles(encoder, encoder.passages([passage])["input_ids"][0].tolist(), ("passages", passage)),
    }


def cut_share(encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of texts, or of the pairs that query i and passage i make: how many are cut, and of how many tokens.

    `tokens` counts prompts and special tokens too; `lost` is the share of all tokens that is cut.
    """
    whole = replace(encoder, query_length=_WHOLE, passage_length=_WHOLE, max_length=_WHOLE)
    if encoder.reads_pairs:
        pairs = min(len(queries), len(passages))
        rows = whole.pair_rows(list(queries[:pairs]), list(passages[:pairs]))[0] if pairs else []
        return {"pairs": _cut(rows, encoder.max_length)}
    found: dict[str, dict[str, Any]] = {}
    sides: tuple[tuple[Literal["queries", "passages"], Sequence[str], int], ...] = (
        ("queries", queries, encoder.query_length),
        ("passages", passages, encoder.passage_length),
    )
    for side, texts, length in sides:
        found[side] = _cut(whole.rows(list(texts), side)[0] if texts else [], length)
    return found


def _cut(rows: Sequence[Any], length: int) -> dict[str, Any]:
    tokens = [len(row) for row in rows]
    over = [n for n in tokens if n > length]
    return {
        "texts": len(tokens),
        "length": length,
        "cut": len(over) / max(len(tokens), 1),
        "tokens": sum(tokens),
        "lost": sum(n - length for n in over) / max(sum(tokens), 1),
        "longest": max(tokens, default=0),
    }


def _with_roles(
    encoder: TextEncoder, row: list[int], text: tuple[Literal["queries", "passages"], str] | None
) -> list[tuple[str, str]]:
    tokenizer = encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    roles = ["special" if token in special else "text" for token in row]
    if text is not None and tokenizer.is_fast:
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
    fields = scorer.Settings.model_fields
    found: dict[str, dict[str, Any]] = {}
    for name in _LENGTHS:
        if name not in fields:
            continue
        tokens = getattr(encoder, name)
        says = given.get(name, record.get(name))
        if says is not None and says == tokens:
            source = "settings" if name in given else RECORD
        elif says is not None:
            source = "passage_length: one length is served"
        elif tokens != fields[name].default or (scorer.gives_vectors and encoder.longest is not None):
            source = "the model's files"
        else:
            source = "default"
        found[name] = {"tokens": tokens, "from": source}
    return found


def _similarity(scorer: Kind) -> dict[str, Any] | None:
    """Of a kind that gives vectors: what its files name, what is computed here, and whether both order passages alike."""
    if not scorer.gives_vectors:
        return None
    path = scorer.config.path
    named = read_json(path, "config_sentence_transformers.json").get("similarity_fn_name")
    unit = bool(getattr(scorer, "normalize", False))
    theirs = named or ("cosine" if family_of(path) is not None else None)  # null is cosine there
    # Of unit vectors these rank alike; manhattan's distance does not.
    honoured = theirs in (None, "dot") or (unit and theirs in ("cosine", "euclidean"))
    return {"files": named, "computed": "cosine" if unit else "dot", "honoured": honoured}


def _tokenizer(encoder: TextEncoder) -> dict[str, Any]:
    tokenizer = encoder.tokenizer
    return {
        "class": type(tokenizer).__name__,
        "fast": bool(tokenizer.is_fast),
        "vocabulary": len(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    }


def _in_a_run(scorer: Kind, given: dict[str, Any]) -> dict[str, Any]:
    """The lengths of a run's teacher or student with these settings, or the line by which the run refuses them."""
    kind = KINDS[scorer.name]
    tree = {"path": scorer.config.path, "kind": scorer.name, **given}
    lengths: dict[str, int] = {}
    refused = None
    try:
        encoder = kind.read_text(parse_section(kind.Settings, tree, scorer.config.path))
        lengths = {name: getattr(encoder, name) for name in _LENGTHS if name in kind.Settings.model_fields}
    except InputError as error:
        refused = str(error)
    return {
        "lengths": lengths,
        "refused": refused,
        "can_be_student": kind.can_be_student,
        "can_be_trained": kind.can_be_trained,
    }


def _notes(scorer: Kind, encoder: TextEncoder, facts: dict[str, Any]) -> list[str]:
    """What a reader would not expect."""
    notes: list[str] = []
    similarity, files = facts["similarity"], facts["files_length"]
    own = read_json(encoder.path, "config_sentence_transformers.json")
    if similarity is not None and not similarity["honoured"]:
        theirs = similarity["files"] or "cosine (null)"
        notes.append(f"similarity: its files name {theirs}, here the dot product ranks; set normalize=true for cosine")
    if own.get("truncate_dim"):
        notes.append(f"truncate_dim: {own['truncate_dim']} of its files is ignored: vectors keep their width")
    where = "here" if scorer.reads_pairs else "in a run"
    read = facts["lengths"] if scorer.reads_pairs else facts["in_a_run"]["lengths"]
    for name, length in read.items():
        tokens = length["tokens"] if isinstance(length, dict) else length
        if files is not None and tokens < files:
            notes.append(f"{name}: {tokens} tokens {where}, its files say {files}; set {name}={files} to read as much")
    for side, prompt in facts["prompts"].items():
        length = facts["in_a_run"]["lengths"].get(f"{side}_length")
        if length is not None and prompt:
            left = length - len(encoder.ids([prompt], _WHOLE)[0])
            if left < _FEW:
                notes.append(f"{side} prompt: leaves {max(left, 0)} of a run's {length} tokens; raise {side}_length")
    if facts["pooling"] is not None and family_of(encoder.path) is None:
        notes.append(f"pooling: no file names one; {facts['pooling']} is taken")
    return notes
