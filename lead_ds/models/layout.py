"""What stands beside a model's weights: the modules of a sentence-transformers, PyLate or ColBERT directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lead_ds.data.tokens.model_files import RECORD
from lead_ds.errors import InputError
from lead_ds.io.hub import find_file

PoolingMode = Literal["cls", "mean", "last"]

__all__ = ["RECORD", "Layout", "read_json", "read_layout", "serving_length"]

_POOLING: dict[str, PoolingMode] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


@dataclass(frozen=True)
class Layout:
    """What `modules.json` says of a model: every field is at its default where there is none."""

    subfolder: str = ""
    pooling: PoolingMode | None = None
    dense: tuple[str, ...] = ()
    normalize: bool = False
    late_interaction: bool = False  # Dense layers read tokens (PyLate, sentence-transformers' multi-vector models)


def read_json(file: Path) -> Any:
    """A JSON file's content; InputError where it is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, f"not readable as JSON: {error}") from None


def read_layout(path: str, *, late_interaction: bool = False) -> Layout:
    """The layout of a directory or hub repository.

    `late_interaction`: read it as a ColBERT, where Dense layers stand on tokens and no pooling is needed.
    Raises InputError for modules whose meaning is not known here: leaving them out would change the vectors.
    """
    file = find_file(path, "modules.json")
    if file is None:
        return Layout()
    modules = read_json(file)
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules
    ):
        raise InputError(file, "not a list of modules with a type")
    subfolder, pooling, dense, normalize, tokens = "", None, [], False, False
    for module in modules:
        kind, where = module["type"].rsplit(".", 1)[-1], str(module.get("path", ""))
        if ".." in Path(where).parts or Path(where).is_absolute():
            raise InputError(file, f"module path {where!r} leaves the directory")
        if kind == "Transformer":
            subfolder = where
        elif kind == "Pooling":
            pooling = _pooling(path, where)
        elif kind == "Dense":
            tokens = tokens or pooling is None
            dense.append(where)
        elif kind == "Normalize":
            normalize = True
        elif kind not in ("Dropout", "MultiVectorMask"):  # neither changes a vector at inference
            raise InputError(
                file, f"module {module['type']} is not supported", "Transformer, Pooling, Dense, Normalize are"
            )
    if tokens and not late_interaction:
        raise InputError(file, "its Dense layer reads tokens: this is a late-interaction model", "use kind: colbert")
    # PyLate normalises token vectors without saying so in modules.json.
    return Layout(subfolder, pooling, tuple(dense), normalize or tokens, tokens)


def serving_length(path: str) -> int | None:
    """How many tokens of a text a sentence-transformers directory says it reads; None where it does not say."""
    file = find_file(path, "sentence_bert_config.json")
    longest = read_json(file).get("max_seq_length") if file is not None else None
    return longest if isinstance(longest, int) and longest > 0 else None


def _pooling(path: str, folder: str) -> PoolingMode:
    file = find_file(path, f"{folder}/config.json" if folder else "config.json")
    if file is None:
        raise InputError(path, f"modules.json names {folder}, which has no config.json")
    tree = read_json(file)
    modes = tree.get("pooling_mode") or [mode for key, mode in _LEGACY_POOLING.items() if tree.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise InputError(
            file, f"pooling {'+'.join(map(str, modes))} is not supported", "set pooling: cls, mean or last"
        )
    if tree.get("include_prompt") is False:
        raise InputError(file, "pooling without the prompt's tokens (include_prompt: false) is not supported")
    return _POOLING[modes[0]]
