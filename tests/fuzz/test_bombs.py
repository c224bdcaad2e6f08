"""A small file that would fill memory is refused in one line, within the bounds of `check`."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError
from lead_ds.io import jsonl, mapped
from lead_ds.prepare.files import list_files
from lead_ds.settings.data import DataConfig
from tests.fuzz.check import bounds, check
from tests.fuzz.readers import READERS, beir

ZEROS = gzip.compress(b"\0" * (16 << 20), mtime=0)  # a thousandth of its size
MANY = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)


def npy(shape: tuple[int, ...]) -> bytes:
    header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64


def safetensors(length: int, shape: list[int]) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 64]}}).encode()
    return (length or len(header)).to_bytes(8, "little") + header + b"\0" * 64


def zipped() -> bytes:
    out = io.BytesIO(beir("zip"))
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/qrels/dev.tsv", b"\0" * (300 << 20))
    return out.getvalue()


BOMBS = {
    "aliases": ("configuration", MANY.encode()),
    "brackets": ("groups", b"[" * 100_000),
    "brackets of JSON": ("deepspeed", b"[" * 100_000),
    "an array's header": ("vectors: vectors-00000.npy", npy((1 << 40, 3))),
    "an array's header, within int64": ("vectors: vectors-00000.npy", npy((4, 1 << 60))),
    "a header's length": ("teacher cache: relevance-00000.safetensors", safetensors(1 << 62, [16])),
    "a tensor's shape": ("teacher cache: relevance-00000.safetensors", safetensors(0, [1 << 40, 1 << 40])),
    "a zip's ratio": ("zip", zipped()),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str) -> None:
    reader, content = BOMBS[name]
    assert not check(READERS[reader], content)


def test_a_small_gz_of_a_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MOST_UNPACKED", 1 << 20)
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(jsonl, "BLOCK", 1 << 18)
    monkeypatch.setenv("LEAD_DS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(ZEROS)
    with bounds(), pytest.raises(InputError, match=r"corpus\.jsonl\.gz:1: a line of more than 1 MB"):
        list(jsonl.read_blocks(path, mapped.open_buffer(path)))
    with bounds(), pytest.raises(InputError, match=r"corpus\.jsonl\.gz:1: a line of more than 1 MB"):
        list(jsonl.read_lines(path))
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 200_000))
    assert sum(len(block.records) for block in jsonl.read_blocks(path, mapped.open_buffer(path))) == 200_000
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 1


def test_what_steers_a_terminal_is_shown_and_not_sent(tmp_path: Path) -> None:
    """A column's name is repeated in the error."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"query\\u001b[2J": "one", "p\\u007fs": ["x"], "neg": ["y"]}\n', "utf-8")
    with pytest.raises(InputError) as refused:
        open_groups(DataConfig(path=str(tmp_path), negatives=1))
    assert str(refused.value).isprintable()
    assert r"\x1b[2J" in str(refused.value)


def test_a_member_without_a_name_is_passed_over(tmp_path: Path) -> None:
    out = io.BytesIO(beir("zip"))
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("z/a", "text")
    path = tmp_path / "x.zip"
    path.write_bytes(out.getvalue().replace(b"z/a", b"\0/a"))
    with zipfile.ZipFile(path) as archive:
        assert "" in archive.namelist()
    names = {file.inner for file in list_files(path)}
    assert "x/corpus.jsonl" in names
    assert "" not in names
