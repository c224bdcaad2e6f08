"""Documents and docstrings are short: lines that a screen holds, sentences that are read once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE, SENTENCE = 130, 30
PAGES = [
    *ROOT.glob("*.md"),
    *(page for room in ("benchmarks", "docs", "launch") for page in (ROOT / room).rglob("*.md")),
]
ITEM = re.compile(r"^([-*]|\d+\.) ")


def sentences(text: str) -> Iterator[str]:
    """Of prose and lists; not of code, tables and headings. A code span is one word."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", re.sub(r"`[^`]*`", "x", text)):
        if not block.startswith("    ") and not block.lstrip().startswith(("|", "#", "<", "{", ">>>")):
            yield from re.split(r"(?<=[.!?])[\"')*]*\s+", ITEM.sub("", block.strip(), 1))


def too_long(text: str) -> list[str]:
    counted = ((sum(bool(re.search(r"\w", word)) for word in said.split()), said) for said in sentences(text))
    return [f"{count} words: {said}" for count, said in counted if count > SENTENCE]


def test_pages() -> None:
    wrong = [
        f"{page.relative_to(ROOT)}:{number} has {len(line)} characters"
        for page in PAGES
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1)
        if len(line) > LINE and not line.startswith("|")
    ]
    wrong += [f"{page.relative_to(ROOT)}: {found}" for page in PAGES for found in too_long(page.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_docstrings() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    wrong = [
        f"{file.relative_to(ROOT)}: {found}"
        for file in (ROOT / "lead_ds").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, documented)
        for found in too_long(ast.get_docstring(node) or "")
    ]
    assert not wrong, "\n".join(wrong)
