"""Strict YAML and JSON: what is written twice, means another thing than it looks like, or grows without end is refused.

Scalars are read by YAML 1.2's core schema: `yes` and `1:30` are text, `5e-5` is a number, `0100` is a hundred.
PyYAML reads YAML 1.1, and keeps the last of two equal keys; ruamel.yaml reads 1.2, but makes dates, does not bound
aliases, and takes half a second to import. So the loader here is PyYAML's safe one with the scalars of 1.2.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lead_ds.errors import InputError

LONGEST = 1 << 22  # characters of a document
MOST = 100_000  # values that a document may hold once its aliases are written out
DEEPEST = 100  # sections within sections

_NULL = r"null|Null|NULL|~|"
_BOOL = r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_NUMBER = re.compile(f"(?:{_INT}|{_FLOAT})")
_WORDS: dict[str, bool | None] = {text: text[0] in "tT" for text in _BOOL.split("|")}
_WORDS |= dict.fromkeys(_NULL.split("|"))


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema; `<<` merges as in YAML 1.1."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # type: ignore[misc]  # noqa: RUF012 - PyYAML's own is as mutable


for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("merge", "<<")):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)
for _tag in ("null", "bool"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda _, node: word(node.value))
for _tag in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", lambda _, node: number(node.value))


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what YAML 1.1 or 1.2 would take for another type."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), None)
Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INT})$"), None)
# What YAML cannot hold as it is, or would fold as the end of a line.
_ESCAPED = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def write_yaml(tree: Any) -> str:
    """A plain tree as a YAML document, which `read_yaml` reads back equal."""
    return str(yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def in_yaml(value: Any) -> str:
    """A value as an override writes it: a text bare where every type reads it back as it is, else in quotes.

    >>> in_yaml("dev.small"), in_yaml("query: "), in_yaml([1, None])
    ('dev.small', '"query: "', '[1, null]')
    """
    if (
        isinstance(value, str)
        and re.fullmatch(r"[\w./@+-][\w./@+,=: -]*(?<! )", value)
        and plain_scalar(value) == value
    ):
        return value
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def word(text: str) -> bool | None:
    """The boolean or null that a plain scalar means. Raises ValueError where it is neither."""
    if text in _WORDS:
        return _WORDS[text]
    raise ValueError(f"{text!r} is neither a boolean nor null")


def number(text: str) -> int | float:
    """The number that a plain scalar means. Raises ValueError where it is not one.

    >>> number("5e-5"), number("0100"), number("-.inf")
    (5e-05, 100, -inf)
    """
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    plain = text.lower().replace(".inf", "inf").replace(".nan", "nan")
    if plain.startswith(("0o", "0x")):
        return int(plain, 0)
    try:
        return int(plain)
    except ValueError:
        return float(plain)


def read_yaml(text: str, where: str | Path) -> Any:
    """The plain tree of a YAML document.

    Raises InputError with its line for what is not YAML, and for a key that is given twice.
    """
    return _constructed(_composed(text, where), where)


def read_json(text: str, where: str | Path) -> Any:
    """The plain tree of a JSON document. Raises InputError as `read_yaml`, and for numbers that are not finite."""
    twice: list[str] = []

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is not a number in JSON")

    def collected(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return tree

    try:
        tree = json.loads(text, parse_constant=refused, object_pairs_hook=collected)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{error.lineno}", f"not valid JSON: {error.msg}", "correct the file") from None
    except (RecursionError, ValueError) as error:
        raise InputError(where, f"not valid JSON: {error}", "correct the file") from None
    if twice:
        _composed(text.replace("\t", " "), where)  # JSON is YAML, but for tabs between values: this names the lines
        raise InputError(where, f"{twice[0]!r} is given twice", "keep one")
    return tree


def compose_value(text: str) -> yaml.Node | None:
    """The nodes of one value, such as `[0, 2]`. Raises yaml.YAMLError, and InputError as `read_yaml`."""
    node = _compose(text)
    _check(node, "the value")
    return node


def plain_scalar(text: str) -> Any:
    """What a plain scalar means where nothing decides which type it must have."""
    for meaning in (word, number):
        try:
            return meaning(text)
        except ValueError:
            pass
    return text


def _compose(text: str) -> yaml.Node | None:
    loader = Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _composed(text: str, where: str | Path) -> yaml.Node | None:
    if len(text) > LONGEST:
        raise InputError(where, f"is longer than {LONGEST} characters", "name the configuration itself")
    try:
        node = _compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(place, f"not valid YAML: {' '.join(str(problem).split())}", "check the indentation") from None
    except RecursionError:
        raise InputError(where, "is nested too deeply", f"at most {DEEPEST} sections within sections") from None
    _check(node, where)
    return node


def _constructed(node: yaml.Node | None, where: str | Path) -> Any:
    if node is None:
        return None
    loader = Loader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise InputError(place, f"not valid YAML: {getattr(error, 'problem', error)}", "correct the line") from None
    except (ValueError, RecursionError) as error:  # such as !!int over a word
        raise InputError(where, f"not valid YAML: {error}", "correct the value") from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _check(root: yaml.Node | None, where: str | Path) -> None:
    """Refuse keys that are given twice, sections that hold themselves, and aliases that multiply without end."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node, depth: int) -> float:
        """How many values there are in a node when aliases are written out; infinite within itself."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        known = sizes.get(id(node))
        if known is not None:
            return known
        place = f"{where}:{node.start_mark.line + 1}"
        if depth > DEEPEST:
            raise InputError(place, "is nested too deeply", f"at most {DEEPEST} sections within sections")
        sizes[id(node)] = math.inf
        children: list[yaml.Node] = list(node.value)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            children = [child for pair in node.value for child in pair]
        total = sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
        if total > MOST:
            what = "holds itself" if math.isinf(total) else f"holds more than {MOST} values, written out"
            raise InputError(place, what, "write the values instead of aliases")
        return total

    if root is not None:
        size(root, 0)


def _check_keys(node: yaml.MappingNode, where: str | Path) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}:{line}", "a key is a list or a section", "write a name before the colon")
        first = lines.get((key.tag, key.value))
        if first is not None:
            what = f"{key.value!r} is given twice, first in line {first}"
            raise InputError(f"{where}:{line}", what, "keep one of the two")
        lines[key.tag, key.value] = line
