import contextlib
import gzip
import json
from pathlib import Path

import pytest

from lead_ds.errors import InputError
from lead_ds.io.files import write_json
from lead_ds.io.json_text import parse_json
from lead_ds.io.jsonl import open_text, read_blocks, read_jsonl, require_file


def test_lines_are_numbered_as_in_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": "é"})]


def test_gz_is_read_as_it_is_and_found_without_its_ending(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert require_file(tmp_path / "a.jsonl") == tmp_path / "a.jsonl.gz"
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"a": 1})]
    with open_text(tmp_path / "a.jsonl.gz") as file:
        assert file.read() == '{"a": 1}\n'


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        (b'{"a": 1}\n\n{"a": \n', ":3", "not valid JSON"),
        (b'{"a": 1}\n[1]\n', ":2", "a JSON array, not an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2", ""),
        (b"[" * 100_000, ":1", ""),
        (b'{"a": 1}\n{"a": 1, "b": "a", "a": 2}\n', ":2", "has the key 'a' twice"),
        (b'{"a": 1}\n\n{"b": 1, "c": {"b": 1}, "b": 1}\n', ":3", "has the key 'b' twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, place: str, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for read in (lambda: list(read_jsonl(path)), lambda: list(read_blocks(path, content))):
        with pytest.raises(InputError) as caught:
            read()
        assert caught.value.where.startswith(str(path))
        assert what in caught.value.what
    assert caught.value.where == f"{path}{place}"


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        next(read_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match="is a folder"):
        next(read_jsonl(tmp_path))
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        list(read_jsonl(tmp_path / "cut.jsonl.gz"))


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 20])
def test_blocks_hold_every_record_at_its_offset(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lead_ds.io.jsonl.BLOCK", block)
    lines = [b'{"i": %d, "x": "%s"}' % (i, b"y" * (i % 30)) for i in range(50)]
    content = b"\xef\xbb\xbf" + b"\n".join(lines[:20]) + b"\n\n\r\n" + b"\n".join(lines[20:])
    blocks = list(read_blocks(tmp_path / "a", content))
    assert [record["i"] for b in blocks for record in b.records] == list(range(50))
    starts = [int(start) for b in blocks for start in b.starts]
    assert [content[a : a + len(line)] for a, line in zip(starts, lines, strict=True)] == lines
    assert [number for b in blocks for number in b.numbers] == [*range(1, 21), *range(23, 53)]


@pytest.mark.parametrize(
    "line",
    ['{"text": "text", "a": "\\"text\\""}', '{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}', '{"a": "\\"a", "b": "a"}'],
)
def test_what_only_looks_like_a_key_given_twice_is_read(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line}\n{line}\n")
    assert [record for _, record in read_jsonl(path)] == [json.loads(line)] * 2
    assert [record for block in read_blocks(path, path.read_bytes()) for record in block.records] == [
        json.loads(line)
    ] * 2


@pytest.mark.parametrize(
    "deep", ['{"a": "a", "b": %s}' % ("[" * 1000 + "]" * 1000), '{"a": "a", "b": %s}' % ("1" * 5000)]
)
def test_what_another_parser_does_not_take_is_read_or_refused(deep: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{deep}\n")
    for read in (lambda: list(read_jsonl(path)), lambda: list(read_blocks(path, path.read_bytes()))):
        with contextlib.suppress(InputError):
            assert len(read()) == 1


def test_half_a_character_is_written_as_it_can_be_read(tmp_path: Path) -> None:
    value = {"\ud800 é": ["\udfff", "\\ud800", "𝄞"]}
    write_json(tmp_path / "a.json", value)
    assert parse_json((tmp_path / "a.json").read_text("utf-8")) == value
