"""Texts alone: JSON lines, plain lines, parquet, gzipped, a folder of them; each read as a query or as a passage."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from lead_ds.data.groups.alone import TextFile, TextsAlone
from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError
from lead_ds.settings.data import DataConfig


def opened(folder: Path, train: str = "texts", **settings: Any) -> TextsAlone:
    groups = open_groups(DataConfig(path=str(folder), train=train, format="texts", **settings))
    assert isinstance(groups, TextsAlone)
    return groups


def told(groups: TextsAlone) -> list[tuple[str, str | None]]:
    drawn = [groups.draw(row, seed=0, epoch=row) for row in range(len(groups))]
    return [(group.passages[0], group.role) for group in drawn]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of each form."""
    import pyarrow as pa
    import pyarrow.parquet

    texts = tmp_path / "texts"
    texts.mkdir()
    rows = [{"text": "a wolf"}, {"text": "who howls", "role": "query"}, {"title": "Dogs", "text": "bark"}]
    (texts / "a.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    (texts / "b.txt").write_bytes("\ufeffa cat\r\n\n  \na cow".encode())
    pyarrow.parquet.write_table(pa.table({"passage": ["a fox", "a hen"], "id": [1, 2]}), texts / "c.parquet")
    (texts / "queries.txt").write_text("who meows\n")
    (texts / "README.md").write_text("not a text")
    return tmp_path


def test_a_folder_of_every_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAD_DS_CACHE", str(folder / "cache"))
    groups = opened(folder)
    expected = [
        *[("a wolf", "passage"), ("who howls", "query"), ("Dogs bark", "passage"), ("a cat", "passage")],
        *[("a cow", "passage"), ("a fox", "passage"), ("a hen", "passage"), ("who meows", "query")],
    ]
    assert told(groups) == expected == told(pickle.loads(pickle.dumps(groups)))
    assert {role for _, role in told(opened(folder, role="query"))} == {"query"}
    assert told(opened(folder, "texts/b.txt"))[1] == ("a cow", "passage")
    assert groups.where(4) == f"{folder / 'texts' / 'b.txt'}:4"
    assert groups.draw(0, 0, 0).keys.tolist() != groups.draw(1, 0, 0).keys.tolist()


def test_a_line_is_read_where_it_lies(folder: Path) -> None:
    path = folder / "many.txt"
    path.write_text("".join(f"text number {n}\n" for n in range(5000)))
    file = TextFile.open(path, None)
    assert len(file) == 5000
    assert file[4321] == ("text number 4321", "passage")
    assert not isinstance(file._buffer, bytes)  # mapped, not read


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n{"text": 7}\n', r"texts\.jsonl:2: the field 'text' is not a text"),
        ('{"words": "a"}\n', r"texts\.jsonl:1: no text"),
        ('{"text": "a", "role": "title"}\n', r"texts\.jsonl:1: the role 'title' is not query or passage"),
        ('{"text": "a", "titel": "b"}\n', r"texts\.jsonl:1: the field 'titel' is none that is read .*'title'"),
        ("", "holds no texts"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "texts.jsonl").write_text(content)
    with pytest.raises(InputError, match=says):
        opened(tmp_path, "texts.jsonl")


def test_groups_that_list_their_texts_are_groups(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"query": "q", "positives": ["a"], "negatives": ["b"]}\n')
    config = {"path": str(tmp_path), "format": "texts", "negatives": 1}
    assert not open_groups(DataConfig(**config)).alone
    with pytest.raises(InputError, match=r"data\.role: is ignored"):
        open_groups(DataConfig(**config, role="query"))
