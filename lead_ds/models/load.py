"""From a configuration to a scorer and to how it reads text; from a directory to both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.models.backbone import read_model_config
from lead_ds.models.dtypes import served_in
from lead_ds.models.files import RECORD, family_of, read_json
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.models.special_weights import check_trainable
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.parse import apply_override, parse_section

__all__ = ["kind_of", "load_encoder", "load_scorer", "load_student", "load_teacher", "load_text", "read_model_config"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = ("query_length", "passage_length", "max_length")

C = TypeVar("C", bound=ModelConfig)


def load_teacher(config: Any, dtype: torch.dtype, depth: int | None = None) -> Kind:
    """The scorer of a teacher's configuration, in evaluation mode; sharded where an HfDeepSpeedConfig is active.

    depth: build its first layers only. They say what they say in the whole model; the final state is another one.

    Raises InputError: see `lead_ds.models.backbone.load_model`; also a cross-encoder without a trained head.
    """
    frozen = not getattr(config, "train", False)
    if not frozen:
        check_trainable(read_model_config(config), config.path)
    return KINDS[config.kind].load(config, dtype, depth=depth, frozen=frozen)


def load_student(config: Any, dtype: torch.dtype) -> Kind:
    """The scorer of a student's configuration, in training mode, cut to `layers` where those are given."""
    check_trainable(read_model_config(config), config.path)
    student = KINDS[config.kind].load(config, dtype, layers=getattr(config, "layers", None), student=True)
    if not student.can_be_student:
        raise InputError(
            config.path, "is a frozen teacher only: its own code finishes its vectors", "choose another model"
        )
    return student.train()


def load_text(config: Any) -> TextEncoder:
    """How the model of a teacher's or student's configuration reads text.

    Prompts that are null come from the model's files. Raises InputError when the tokenizer cannot be loaded or lacks what the
    configuration needs, and when a length exceeds the model's positions.
    """
    return KINDS[config.kind].read_text(config)


def with_lengths(config: C, read: Callable[[C], Any] = load_text) -> C:
    """A teacher's or student's configuration with numbers in place of lengths that are null: what `read` makes of it.

    Raises InputError as `load_text`.
    """
    open_ones = [name for name in LENGTHS if getattr(config, name, 0) is None]
    if not open_ones:
        return config
    encoder = read(config)
    return config.model_copy(update={name: getattr(encoder, name) for name in open_ones})


def settled_model(config: C) -> C:
    """A model's settings in a run, with its files' lengths, and how they compare vectors where no module of it says so.

    Raises InputError as `load_text`, and for a distance in place of a similarity.
    """
    return with_lengths(KINDS[config.kind].settled(config))


def load_encoder(
    path: str | Path, settings: Sequence[str] = (), device: torch.device | str = "cpu"
) -> tuple[Any, TextEncoder]:
    """As `load_scorer`, a model of vectors. Raises InputError for a directory that holds another kind of model."""
    name, rest = named_kind(str(path), settings)
    if name in KINDS and not KINDS[name].gives_vectors:
        ways = " or ".join(f"kind={name}" for name in KINDS if KINDS[name].gives_vectors)
        raise InputError(
            path, f"holds a {name}", f"a model of one vector a text is needed here; {ways} reads it as one"
        )
    return load_scorer(str(path), name, rest, device)


def named_kind(path: str, settings: Sequence[str], kind: str | None = None) -> tuple[str, list[str]]:
    """The kind of a model, and its settings without `kind=K`: as that or `kind` names it, else as its files do.

    Raises InputError as `kind_of`, and where the two contradict.
    """
    is_kind = [setting.partition("=")[0].strip() == "kind" for setting in settings]
    named = [setting.partition("=")[2].strip() for setting, one in zip(settings, is_kind, strict=True) if one]
    if len({*named, *([] if kind is None else [kind])}) > 1:
        raise InputError("kind", f"is named twice: {', '.join(filter(None, [kind, *named]))}", "name it once")
    rest = [setting for setting, one in zip(settings, is_kind, strict=True) if not one]
    return kind or (named[0] if named else kind_of(path)), rest


def load_scorer(
    path: str, kind: str | None = None, settings: Sequence[str] = (), device: torch.device | str = "cpu"
) -> tuple[Kind, TextEncoder]:
    """A model of any kind in evaluation mode (not yet on `device`), and its tokenisation as its files say.

    kind: None: what its files say. settings: `key=value` of the kind's section, which win over the files, or `kind=K`. Weights
    are as `dtype` says, else of `served_in`'s dtype.
    Raises InputError for a directory that holds another kind of model, and for an unknown setting.
    """
    record = read_json(path, RECORD)
    name, settings = named_kind(path, settings, kind)
    if record.get("kind", name) != name:
        raise InputError(path, f"holds a {record['kind']}", f"it cannot be read as a {name}")
    if name not in KINDS:
        remedy = "the class that made it loads it, see its README.md" if kind is None else "choose one of these"
        raise InputError(path, f"a {name} is none of {', '.join(KINDS)}", remedy)
    found = KINDS[name]
    tree: dict[str, Any] = {}
    for setting in settings:
        apply_override(tree, setting, found.Settings)
    recorded = {"scale": record["scale"]} if found.gives_vectors and "scale" in record else {}
    config = parse_section(found.Settings, {"path": path, "kind": name, **recorded, **tree}, path)
    generates = found.head == "causal"
    dtype = DTYPES.get(config.dtype) or served_in(path, torch.device(device), generates=generates)
    encoder = found.read_text(config)
    config = with_lengths(config, lambda _: encoder)
    return found.load(config, dtype, student=found.gives_vectors, frozen=not found.gives_vectors), encoder


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
        raise InputError(path, what, f"set kind=K, one of {', '.join(sorted(KINDS))}")
    return max(KINDS, key=lambda name: KINDS[name].claims(path))
