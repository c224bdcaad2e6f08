"""Settings as a stage needs them: those that decide its output, as overrides, and as command-line options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config
from lead_ds.settings.base import Section
from lead_ds.settings.meaning import keys_of


def deciding(config: Config) -> dict[str, Any]:
    """The settings that decide a stage's output, up to the last bits; DeepSpeed's own settings by their content.

    Without defaults as well, so that a key that a later version adds makes nothing again.
    """
    free = keys_of(config, "place", "pace", "bits") | {"deepspeed"}
    tree = _deciding(config, config.model_dump(mode="json"), free)
    tree["deepspeed"] = {role: read_deepspeed_config(source) for role, source in config.deepspeed}
    return tree


def _deciding(
    section: Section, tree: Mapping[str, Any], free: Collection[str], at: str = "", usual: Any = None
) -> dict[str, Any]:
    """What a section has otherwise than by default. usual: the form that it has by default, where there are several."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), field.get_default(call_default_factory=True)
        # The key that names a form, such as select, is the default of its form, but not always the section's.
        default = getattr(usual, name, default) if get_origin(field.annotation) is Literal else default
        if f"{at}{name}" in free or value == default:
            continue
        if isinstance(value, list) and all(isinstance(item, Section) for item in value):
            kept[name] = [
                _deciding(item, part, free, f"{at}{name}.{place}.")
                for place, (item, part) in enumerate(zip(value, tree[name], strict=True))
            ]
        elif not isinstance(value, Section):
            kept[name] = tree[name]
        elif (inner := _deciding(value, tree[name], free, f"{at}{name}.", default)) or field.is_required():
            kept[name] = inner
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
