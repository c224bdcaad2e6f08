"""Arrays that grow on disk are those that grow in memory, and go on in memory where the disk is full."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from lead_ds.data.collections import texts
from lead_ds.data.collections.texts import Texts
from lead_ds.io import mapped, spool
from lead_ds.io.spool import Spool
from tests.helpers.forked import forked


def pieces(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**40, rng.integers(0, 50)) for _ in range(60)]


@pytest.mark.parametrize("held", [1, 100, 1 << 22])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_the_array_is_its_pieces(held: int, dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "HELD", held)
    for folder in (tmp_path, None, tmp_path / "missing"):
        one = Spool(dtype, folder)
        for piece in pieces(0):
            one.add(piece)
        np.testing.assert_array_equal(one.whole(), np.concatenate(pieces(0)).astype(dtype))
        assert one.size == len(one.whole())
        assert not [path for path in tmp_path.iterdir() if path.is_file()], "its file has no name"
    assert Spool(dtype, tmp_path).whole().dtype == dtype


def fills(folder: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3001, 3001))  # in the middle of a number
    spool.HELD = 500
    one = Spool(np.int64, Path(folder))
    for piece in pieces(1):
        one.add(piece)
    np.testing.assert_array_equal(one.whole(), np.concatenate(pieces(1)))
    assert one.folder is None, "the file met its limit"


def test_what_cannot_be_written_is_held(tmp_path: Path) -> None:
    process = forked(fills, str(tmp_path))
    process.join()
    assert process.exitcode == 0


def test_an_index_by_parts_is_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "corpus.jsonl"
    names = np.random.default_rng(0).permutation(500)
    path.write_text("".join(f'{{"_id": "{"x" * (n % 9)}{n}", "text": "text {n}"}}\n' for n in names))
    whole = texts._build(path, "corpus", path.read_bytes())
    monkeypatch.setattr(spool, "HELD", 64)
    monkeypatch.setattr(texts, "_SORTED", 16)
    monkeypatch.setattr(mapped, "MIN_CACHED_BYTES", 1)
    parts = texts._build(path, "corpus", path.read_bytes())
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        assert array.dtype == parts[name].dtype
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    opened = Texts.open(path, "corpus")
    assert [opened.row(name) for name in opened.ids] == list(range(500))
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"corpus.jsonl", ".corpus.jsonl.corpus.idx"}
    assert os.path.getsize(tmp_path / ".corpus.jsonl.corpus.idx") > 500 * 8
