"""Settings as a stage needs them: those that decide its output, as overrides, and as command-line options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config

# What may change without a stage's output changing: where things lie (their content counts), how often a run speaks and
# saves, where and how fast the same is computed, and on how many processes something was made.
FREE = {
    *("output", "pipeline", "profile", "monitor", "kernels", "evaluation.batch_size"),
    *("train.save_every", "train.log_every", "train.keep", "train.watchdog_minutes"),
    *("train.compile", "train.overlap", "train.grad_cache", "train.gradient_checkpointing"),
    *("data.path", "data.train", "data.workers", "data.token_cache"),
    *("student.path", "student.passes", "student.attention"),
    *(
        "teacher.path",
        "teacher.passes",
        "teacher.attention",
        "teacher.placement",
        "teacher.offload",
        "teacher.offload_path",
    ),
    *("teacher.batch_size", "teacher.compile", "teacher.truncate", "teacher.lens_path"),
}


def deciding(config: Config) -> dict[str, Any]:
    """The configuration without what does not decide what a run computes; DeepSpeed's own settings by their content.

    Without defaults as well, so that a key that a later version adds makes nothing anew.
    """
    tree = thinned(config.model_dump(mode="json", exclude_defaults=True))
    tree["deepspeed"] = {role: read_deepspeed_config(source) for role, source in config.deepspeed}
    return tree


def thinned(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """A plain tree without the keys of FREE."""
    kept = {}
    for key, value in tree.items():
        path = f"{at}.{key}" if at else key
        if path not in FREE:
            kept[key] = thinned(value, path) if isinstance(value, dict) else value
    return kept


def flat(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Dotted keys of a partial configuration; a DeepSpeed configuration that is given as a dictionary stays one value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{at}.{key}" if at else str(key)
        nested = isinstance(value, dict) and value and at != "deepspeed"
        found |= flat(value, path) if nested else {path: value}
    return found


def options_of(settings: Mapping[str, Any]) -> list[str]:
    """Command-line options of settings by name; true is a flag."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        option = "-k" if name == "k" else "--" + name.replace("_", "-")
        words += [option] if value is True else [option, str(value)]
    return words


def existing(path: Path) -> Path:
    """`path`, or its compressed form where only that is there."""
    packed = path.with_name(path.name + ".gz")
    return packed if not path.exists() and packed.exists() else path
