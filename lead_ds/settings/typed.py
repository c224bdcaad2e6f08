"""A value as a person types it on the command line, read by the type of the field that it is for."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml

from lead_ds.settings.base import Section
from lead_ds.settings.documents import compose_value, number, plain_scalar, word

NULLS = ("null", "Null", "NULL")


class Partial:
    """Marks a field that holds a part of the whole configuration, such as a stage's changes to it."""


def kinds_of(annotation: Any) -> Iterator[Any]:
    """The plain alternatives of an annotation: sections, `list[int]`, `Literal[...]`, str, NoneType ..."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        first, *marks = typing.get_args(annotation)
        yield from ([Partial] if any(isinstance(mark, Partial) for mark in marks) else kinds_of(first))
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from kinds_of(part)
    else:
        yield annotation


def fields_of(kinds: list[Any], name: str, root: type[Section]) -> list[Any]:
    """The plain alternatives of the field `name` in those of `kinds` that are sections; [] where none has it."""
    found: list[Any] = []
    for kind in kinds:
        section = root if kind is Partial else kind
        if is_section(section) and name in section.known_fields():
            field = section.known_fields()[name]
            part = any(isinstance(mark, Partial) for mark in field.metadata)
            found += [kind for kind in ([Partial] if part else kinds_of(field.annotation)) if kind not in found]
        elif typing.get_origin(kind) is dict:
            found += [kind for kind in kinds_of(typing.get_args(kind)[1]) if kind not in found]
    return found


def items_of(kinds: list[Any]) -> list[Any]:
    """The plain alternatives of the items of those of `kinds` that are lists."""
    return [item for kind in kinds if typing.get_origin(kind) is list for item in kinds_of(typing.get_args(kind)[0])]


def is_section(kind: Any) -> bool:
    """Whether a plain alternative of an annotation is a section."""
    plain = typing.get_origin(kind) is None  # Python 3.10 takes list[int] for a type
    return plain and isinstance(kind, type) and issubclass(kind, Section)


def typed_value(text: str, kinds: list[Any], root: type[Section]) -> Any:
    """What `text` means for a field that takes `kinds`; where it may be a string, the text is the value.

    Quotes around it are optional. Raises yaml.YAMLError for a list or a section that cannot be read.

    >>> typed_value("yes", [str], Section), typed_value("1e-5", [float], Section)
    ('yes', 1e-05)
    """
    opened = text.strip()[:1]
    if (opened == "[" and _takes(kinds, list)) or (opened == "{" and _takes(kinds, dict)):
        return _of_node(compose_value(text.strip()), kinds, root)
    quoted = _unquoted(text)
    return _scalar(text, kinds) if quoted is None else quoted


def _takes(kinds: list[Any], shape: type) -> bool:
    """Whether a field may be a list, or a section."""
    if not kinds or Any in kinds:
        return True
    sections = any(kind is Partial or is_section(kind) for kind in kinds)
    return any(typing.get_origin(kind) is shape for kind in kinds) or (shape is dict and sections)


def _unquoted(text: str) -> str | None:
    """The content of one quoted string; None where the text is not one."""
    text = text.strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "\"'":
        return None
    try:
        node = compose_value(text)
    except yaml.YAMLError:
        return None
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None


def _scalar(text: str, kinds: list[Any]) -> Any:
    """A text without quotes as the first of null, a boolean, a number, a choice and a string that the field takes."""
    bare = text.strip()
    if not kinds or Any in kinds:
        return plain_scalar(bare)
    if type(None) in kinds and (bare in NULLS or (not bare and str not in kinds)):
        return None
    for kind in (bool, int, float):
        if kind in kinds:
            try:
                value = word(bare) if kind is bool else number(bare)
            except ValueError:
                continue
            if value is not None:
                return value
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    for choice in choices:
        if bare == str(choice):
            return choice
    return text if str in kinds else plain_scalar(bare)


def _of_node(node: yaml.Node | None, kinds: list[Any], root: type[Section]) -> Any:
    """A value that was read as YAML, its scalars by the types of their own fields."""
    if isinstance(node, yaml.SequenceNode):
        items = items_of(kinds)
        return [_of_node(child, items, root) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {
            str(key.value): _of_node(child, fields_of(kinds, str(key.value), root), root) for key, child in node.value
        }
    assert isinstance(node, yaml.ScalarNode)
    return str(node.value) if node.style in ("'", '"') else _scalar(node.value, kinds)
