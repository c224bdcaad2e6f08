"""Sections that exist in several forms, one for each value of a key such as `select`: a form has only what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import PlainValidator, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from lead_ds.settings.base import Section
from lead_ds.settings.typed import is_section


@dataclass(frozen=True)
class Modes:
    """Marks a field whose section is one of `sections`, chosen by the setting `key`."""

    key: str
    sections: Mapping[str, type[Section]]


def in_modes(key: str, default: str, modes: Mapping[str, type[Section]]) -> Any:
    """The annotation of a section that is one of `modes`, chosen by its `key`; `default` where it has none.

    A setting that the chosen mode ignores is refused, with what to set instead; null counts as not given.

    >>> from pydantic import TypeAdapter
    >>> class Summer(Section):
    ...     season: str = "summer"
    ...     shade: int = 1
    >>> class Winter(Section):
    ...     season: str = "winter"
    ...     wool: int = 2
    >>> weather = TypeAdapter(in_modes("season", "summer", {"summer": Summer, "winter": Winter}))
    >>> weather.validate_python({"season": "winter", "wool": 3}).wool
    3
    """
    known = {name for section in modes.values() for name in section.model_fields}
    of_some = {name for name in known if not all(name in section.model_fields for section in modes.values())}

    def choose(value: Any) -> Any:
        if isinstance(value, tuple(modes.values())):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "refused", "is not a section", {"remedy": f"write it as one, such as {{{key}: {default}}}"}
            )
        chosen = value.get(key, default)
        section = modes.get(chosen) if isinstance(chosen, str) else None
        if section is None:
            raise refusal(
                "section", key, chosen, f"cannot be {chosen!r}", f"use {_any_of(repr(mode) for mode in modes)}"
            )
        own = section.model_fields.keys()
        # An earlier version wrote a run's settings whole, those that it ignored among them.
        saved = of_some <= value.keys()
        given = {name: x for name, x in value.items() if name in own or not (x is None or (saved and name in known))}
        for name in given:
            if name in of_some and name not in own:
                readers = _any_of(mode for mode, section in modes.items() if name in section.model_fields)
                instead = f"set {' and '.join(sorted(of_some & own))} instead" if of_some & own else "take it out"
                what = f"is ignored by {key}: {chosen}"
                raise refusal(section.__name__, name, value[name], what, f"{instead}, or {key}: {readers}")
        required = [name for name, field in section.model_fields.items() if field.is_required()]
        for name in required:
            if given.get(name) is None:
                remedy = f"give {' and '.join(required)}, or another {key}"
                raise refusal(section.__name__, name, None, f"is needed by {key}: {chosen}", remedy)
        return section.model_validate(given)

    return Annotated[SerializeAsAny[Union[tuple(modes.values())]], PlainValidator(choose), Modes(key, modes)]  # type: ignore[misc]  # noqa: UP007


def forget_former(tree: dict[str, Any], overrides: Sequence[str], root: type[Section]) -> None:
    """Where an override changes a section's mode, take out of `tree` what the file sets for another mode.

    What is itself overridden stays, to be refused where the new mode ignores it.
    """
    keys = {override.partition("=")[0].strip() for override in overrides}
    for where in keys:
        *path, key = where.split(".")
        node: Any = tree
        section: list[Any] = [root]
        modes = None
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
            field = next((found for one in section if (found := one.known_fields().get(name))), None)
            modes = next((mark for mark in field.metadata if isinstance(mark, Modes)), None) if field else None
            kind = field.annotation if field else None
            section = [kind] if is_section(kind) else []
        if modes is None or modes.key != key or not isinstance(node, dict) or node.get(key) not in modes.sections:
            continue
        own = modes.sections[node[key]].model_fields
        known = {name for one in modes.sections.values() for name in one.model_fields}
        for name in [name for name in node if name in known and name not in own]:
            if ".".join([*path, name]) not in keys:
                del node[name]


def refusal(section: str, name: str, value: Any, what: str, remedy: str) -> ValidationError:
    """The error of one setting: what is wrong with it, and what to do."""
    error = PydanticCustomError("refused", "{what}", {"what": what, "remedy": remedy})
    return ValidationError.from_exception_data(
        section, [{"type": error, "loc": tuple(name.split(".")), "input": value}]
    )


def _any_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
