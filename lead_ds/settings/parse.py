"""Read settings: strict YAML, then `key=value` overrides by type, then one check that names the place of every mistake."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lead_ds.errors import InputError
from lead_ds.settings.base import Section
from lead_ds.settings.documents import read_yaml
from lead_ds.settings.modes import forget_former
from lead_ds.settings.typed import fields_of, is_section, items_of, typed_value

S = TypeVar("S", bound=Section)
_ITEMS = (
    "name an item by its place, from 0: teachers.0.weight=2; settings beside a list of data go with data.sets: [...]"
)


def load_tree(path: str | Path, overrides: Sequence[str], section: type[Section]) -> dict[str, Any]:
    """The YAML file at `path`, with overrides of `section`'s keys applied, before any check of its content."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(path, "no such configuration file", "see ds_configs/recipes/ for examples") from None
    except IsADirectoryError:
        raise InputError(path, "is a folder", "name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read: {error}", "check the path and its permissions") from None
    tree = read_yaml(text, path)
    if not isinstance(tree, dict):
        raise InputError(path, "does not hold a configuration", "it must be a mapping of sections")
    refuse_twice(overrides)
    for override in overrides:
        apply_override(tree, override, section)
    forget_former(tree, overrides, section)
    return tree


def parse_section(section: type[S], tree: dict[str, Any], where: str | Path) -> S:
    """One checked section of a plain tree; `where` names its source in errors."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        # One mistake a line would break "one line"; the first is reported, and the count of the others.
        first, *others = error.errors(include_url=False)
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        what, remedy = _describe(first, section)
        if others:
            remedy += f"; {len(others)} more such error{'s' if len(others) > 1 else ''} after this one"
        raise InputError(f"{where}: {key}", what, remedy) from None


def refuse_twice(overrides: Sequence[str]) -> None:
    """Raise InputError where one of some `key=value` takes away what an earlier one said."""
    for place, override in enumerate(overrides):
        key = key_of(override)
        for earlier in overrides[:place]:
            if f"{key_of(earlier)}.".startswith(f"{key}."):
                raise InputError(override, f"takes away {earlier!r}, which was given before it", "keep one of them")


def key_of(override: str) -> str:
    """The key of `key=value`."""
    return ".".join(name.strip() for name in override.partition("=")[0].split("."))


def apply_override(tree: dict[str, Any], override: str, section: type[Section]) -> None:
    """Set `a.b.c=value` in `tree`, a plain tree of `section`; the value is read by the type of its field.

    An item of a list is named by its place, from 0: `teachers.0.path=model`.
    """
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise InputError(override, "is not an override", "write section.key=value, such as train.lr=2e-5")
    node: Any = tree
    kinds: list[Any] = [section]
    for name in names[:-1]:
        if isinstance(node, list):
            if not (name.isdecimal() and int(name) < len(node)):
                raise InputError(override, f"there is no item {name!r} in a list of {len(node)}", _ITEMS)
            child, kinds = node[int(name)], items_of(kinds)
        else:
            child, kinds = node.get(name), fields_of(kinds, name, section)
            if child is None:
                child = node[name] = {}
        if not isinstance(child, dict | list):
            raise InputError(override, f"{name!r} is a value, not a section", "check the key")
        node = child
    if isinstance(node, list):
        raise InputError(override, f"{'.'.join(names[:-1])} is a list here", _ITEMS)
    try:
        node[names[-1]] = typed_value(text, fields_of(kinds, names[-1], section), section)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(override, f"the list or section cannot be read: {problem}", "check its brackets") from None


def _describe(error: Any, section: type[Section]) -> tuple[str, str]:
    """What is wrong and what to do, of one pydantic error."""
    location = [part for part in error["loc"] if isinstance(part, str)]
    if error["type"] == "extra_forbidden":
        sections = _sections_at(location[:-1], section)
        instead = next((found.instead[location[-1]] for found in sections if location[-1] in found.instead), None)
        if instead is not None:
            return "is ignored here", instead
        names = list(dict.fromkeys(name for found in sections for name in found.known_fields()))
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        return "unknown key", f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(names)}"
    if "remedy" in error.get("ctx", {}):  # an error of ours, which knows what to do
        return error["msg"], error["ctx"]["remedy"]
    if error["type"] == "model_type":
        names = [name for found in _sections_at(location, section) for name in found.known_fields()]
        return (
            f"is a section, got {error['input']!r}",
            f"set it to {{}} for its defaults, or to {{KEY: VALUE}} of {', '.join(names)}",
        )
    if error["type"] == "missing":
        return "is required", "add it to the configuration"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], (dict, list)) else f", got {error['input']!r}"
    return message[:1].lower() + message[1:] + given, "correct the value"


def _sections_at(location: Sequence[str], root: type[Section]) -> list[type[Section]]:
    """The sections that `location` may lead to from `root`."""
    kinds: list[Any] = [root]
    for part in location:
        kinds = fields_of(kinds, part, root)
        kinds += items_of(kinds)
    return [kind for kind in kinds if is_section(kind)]
