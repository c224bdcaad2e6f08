"""Pages that are made from the program itself: every command's help, every setting, and two files of the repository."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the marked places of a page."""
    for mark, make in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def commands() -> str:
    """Each command with its help, arguments and options, as the program prints them."""
    import typer

    from lead_ds.cli.main import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in sorted(group.commands.items()):
        lines = [f"## {name}", "", *_prose(command.help or ""), "", "| option | meaning | default |", "|---|---|---|"]
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.name == "help":
                continue
            option = parameter.param_type_name == "option"
            words = ", ".join(parameter.opts) if option else parameter.metavar or parameter.name.upper()
            meaning = _cell(getattr(parameter, "help", None) or "")
            default = parameter.default
            shown = "" if default in (None, (), []) or callable(default) else f"`{default}`"
            lines.append(f"| `{words}` | {meaning} | {shown or ('required' if parameter.required else '')} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _prose(text: str) -> list[str]:
    """A help text: lines that name a command become code."""
    return [
        re.sub(r"((?:lead-ds|deepspeed) [a-z-][^.]*)$", r"`\1`", line.rstrip()) for line in text.strip().splitlines()
    ]


def settings() -> str:
    """Every section of the configuration as a table: key, type, default, meaning."""
    from lead_ds.config import Config

    parts: list[str] = []
    _describe(Config, "", parts, set())
    return "\n\n".join(parts)


def _describe(model: type[BaseModel], at: str, parts: list[str], seen: set[tuple[str, type[BaseModel]]]) -> None:
    lines = ["| key | value | default | what it does |", "|---|---|---|---|"]
    below: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        key = f"{at}.{name}" if at else name
        sections = list(_sections(field.annotation))
        below += [(key, section) for section in sections]
        if sections:
            continue
        default = "required" if field.is_required() else f"`{_default(field)}`"
        lines.append(f"| `{name}` | {_cell(_type(field.annotation))} | {default} | {_cell(field.description or '')} |")
    title = f"## {at or 'The run'}"
    kind = model.model_fields.get("kind") or model.model_fields.get("select")
    if kind is not None and typing.get_origin(kind.annotation) is typing.Literal:
        title += f": {', '.join(map(str, typing.get_args(kind.annotation)))}"
    text = (model.__doc__ or "").strip().split("\n\n")[0]
    if len(lines) > 2:
        parts.append("\n".join([title, "", text, "", *lines]))
    for key, section in below:
        if (key, section) not in seen:
            seen.add((key, section))
            _describe(section, key, parts, seen)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, list, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _sections(part)


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in typing.get_args(annotation))
    if annotation is type(None):
        return "`null`"
    return getattr(annotation, "__name__", str(annotation)) if not typing.get_args(annotation) else str(annotation)


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory() if field.default_factory else ""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


def repository_file(name: str) -> str:
    """A Markdown file of the repository, its heading taken off; links into the repository become code."""
    text = (ROOT / name).read_text("utf-8").split("\n", 1)[1]
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", text)


MARKS = {
    "<!-- commands -->": commands,
    "<!-- settings -->": settings,
    "<!-- CONTRIBUTING.md -->": lambda: repository_file("CONTRIBUTING.md"),
    "<!-- CHANGELOG.md -->": lambda: repository_file("CHANGELOG.md"),
    "<!-- recipes -->": lambda: repository_file("ds_configs/recipes/README.md"),
    "<!-- benchmarks -->": lambda: repository_file("benchmarks/README.md"),
    "<!-- launch -->": lambda: repository_file("launch/README.md"),
}
