"""From a configuration to a scorer and to how it reads text; from a directory to both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lead_ds.errors import InputError
from lead_ds.models.backbone import read_model_config
from lead_ds.models.files import RECORD, family_of, read_json
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.settings.parse import apply_override, parse_section

if TYPE_CHECKING:
    from lead_ds.data.tokens.encoder import TextEncoder

__all__ = ["kind_of", "load_encoder", "load_scorer", "load_student", "load_teacher", "load_text", "read_model_config"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RECORDED = ("query_length", "passage_length", "max_length")


def load_teacher(config: Any, dtype: torch.dtype, depth: int | None = None) -> Kind:
    """The scorer of a teacher's configuration, in evaluation mode; sharded where an HfDeepSpeedConfig is active.

    depth: build its first layers only. They say what they say in the whole model; the final state is another one.

    Raises InputError: see `lead_ds.models.backbone.load_model`; also a cross-encoder without a trained head.
    """
    return KINDS[config.kind].load(config, dtype, depth=depth, frozen=not getattr(config, "train", False))


def load_student(config: Any, dtype: torch.dtype) -> Kind:
    """The scorer of a student's configuration, in training mode, cut to `layers` where those are given."""
    return KINDS[config.kind].load(config, dtype, layers=getattr(config, "layers", None), student=True).train()


def load_text(config: Any) -> TextEncoder:
    """How the model of a teacher's or student's configuration reads text.

    Prompts that are null come from the model's files. Raises InputError when the tokenizer cannot be loaded or lacks what the
    configuration needs, and when a length exceeds the model's positions.
    """
    return KINDS[config.kind].read_text(config)


def load_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, dim: int | None = None, **overrides: Any
) -> tuple[Any, TextEncoder]:
    """A model of vectors in evaluation mode and its tokenisation, from a saved student, a sentence-transformers or HF directory.

    Its tokenisation is the one that is served: queries may be as long as passages (`TextEncoder.serving`), and these as
    long as the model's files say. dim: of its vectors, the first so many dimensions. `overrides` are fields of its kind's
    section.
    Raises InputError for a directory that holds another kind of model.
    """
    path = str(path)
    record = read_json(path, RECORD)
    kind = KINDS[record["kind"] if "kind" in record else _likeliest(path, vectors=True)]
    if not kind.gives_vectors:
        raise InputError(path, f"holds a {kind.name}", "a dual encoder is needed here")
    return _served(kind, path, record, overrides | ({} if dim is None else {"dim": dim}), dtype)


def load_scorer(
    path: str, kind: str | None = None, settings: Sequence[str] = (), device: torch.device | str = "cpu"
) -> tuple[Kind, TextEncoder]:
    """A model of any kind in evaluation mode (not yet on `device`), and its tokenisation as it was saved.

    kind: None: what its files say. settings: `key=value` of the kind's section, which win over the files. Weights are float32
    unless `dtype` is given, a decoder reranker's on CUDA float16.
    Raises InputError for a directory that holds another kind of model, and for an unknown setting.
    """
    record = read_json(path, RECORD)
    name = kind or kind_of(path)
    if record.get("kind", name) != name:
        raise InputError(path, f"holds a {record['kind']}", f"it cannot be read as a {name}")
    if name not in KINDS:
        remedy = "the class that made it loads it, see its README.md" if kind is None else "choose one of these"
        raise InputError(path, f"a {name} is none of {', '.join(KINDS)}", remedy)
    found = KINDS[name]
    tree: dict[str, Any] = {}
    for setting in settings:
        apply_override(tree, setting, found.Settings)
    lengths = {key: record[key] for key in _RECORDED if key in record and key in found.Settings.model_fields}
    config = parse_section(found.Settings, {"path": path, "kind": name, **lengths, **tree}, path)
    half = found.head == "causal" and torch.device(device).type == "cuda"
    dtype = DTYPES.get(config.dtype, torch.float16 if half else torch.float32)
    if found.gives_vectors:
        given = {key: getattr(config, key) for key in tree if key not in ("path", "kind")}
        return _served(found, path, record, given, dtype)
    return found.load(config, dtype, frozen=True), found.read_text(config)


def kind_of(path: str) -> str:
    """The kind of a model, by its record, its modules or its architecture.

    Raises InputError for a plain language model: nothing in its files says how it would retrieve.
    """
    said = read_json(path, RECORD).get("kind")
    if said:
        return str(said)
    names = read_json(path, "config.json").get("architectures") or ()
    causal = next((name for name in names if str(name).endswith("ForCausalLM")), None)
    if causal is not None and family_of(path) is None:
        what = f"is a language model ({causal}), and no file says how it retrieves"
        raise InputError(path, what, f"set its kind (--kind K, or kind: K): {', '.join(KINDS)}")
    return _likeliest(path)


def _likeliest(path: str, *, vectors: bool = False) -> str:
    kinds = [name for name in KINDS if KINDS[name].gives_vectors or not vectors]
    return max(kinds, key=lambda name: KINDS[name].claims(path))


def _served(
    kind: type[Kind], path: str, record: dict[str, Any], given: dict[str, Any], dtype: torch.dtype
) -> tuple[Kind, TextEncoder]:
    """A model of vectors with the lengths it was saved for, else those of its files."""
    settings: dict[str, Any] = {"kind": kind.name, "path": path}
    settings |= {key: record[key] for key in ("query_length", "passage_length", "scale") if key in record}
    unknown = [name for name in ("query_length", "passage_length") if name not in settings | given]
    config = kind.Settings(**(settings | dict.fromkeys(unknown, 1) | given))
    encoder = kind.read_text(config)
    if unknown:  # how long, its files say, which have been read now
        longest = encoder.longest or kind.Settings.model_fields["passage_length"].default
        lengths: dict[str, Any] = dict.fromkeys(unknown, longest)
        config, encoder = config.model_copy(update=lengths), replace(encoder, **lengths)
    return kind.load(config, dtype, student=True), encoder.serving()
