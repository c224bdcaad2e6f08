import gzip
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lead_ds.data.collections import texts
from lead_ds.data.collections.texts import Texts, hash_ids
from lead_ds.errors import InputError
from lead_ds.io import mapped
from tests.helpers.tiny import tiny_dataset, write_jsonl


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index files are written for files of any size."""
    monkeypatch.setattr(mapped, "MIN_CACHED_BYTES", 0)


def passages(count: int) -> list[dict[str, str]]:
    return [{"_id": f"id-{i * i}", "title": "T" if i % 3 else "", "text": f"text {i} é"} for i in range(count)]


def test_rows_ids_and_texts_agree_with_the_file(folder: Path) -> None:
    corpus = Texts.open(folder / "corpus.jsonl", "corpus")
    records = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    assert list(corpus.ids) == [record["_id"] for record in records]
    assert corpus.ids[-1] == "p59"
    assert corpus.ids[3:5] == ["p3", "p4"]
    assert corpus.ids[5:3] == []
    assert len(corpus) == len(corpus.ids) == 60
    for row, record in enumerate(records):
        assert corpus.row(record["_id"]) == row
        assert corpus.text(row) == (record["title"] + " " + record["text"]).strip()
    assert corpus.rows(["p7", "nope", "", "p70", "p59"]).tolist() == [7, -1, -1, -1, 59]
    assert corpus.rows([]).tolist() == []
    assert "p7" in corpus
    assert "p77" not in corpus
    assert corpus.texts(np.array([2, 0])) == [corpus.text(2), corpus.text(0)]
    for wrong in (60, -1):
        with pytest.raises(IndexError):
            corpus.text(wrong)
    with pytest.raises(InputError, match="no text has the id 'p77'"):
        corpus.row("p77")


def test_ids_of_any_length_and_script(tmp_path: Path) -> None:
    names = ["a", "b" * 8, "b" * 9, "b" * 16, "b" * 300, "é", "日本", "a b", "0", "00", 'quote"d']
    path = write_jsonl(tmp_path / "c.jsonl", [{"_id": name, "text": name} for name in names])
    corpus = Texts.open(path, "corpus")
    assert list(corpus.ids) == names
    assert corpus.rows(names).tolist() == list(range(len(names)))
    assert corpus.rows(["b" * 7, "b" * 299, "b" * 301, "日"]).tolist() == [-1] * 4
    assert [corpus.row(name) for name in names] == list(range(len(names)))


def test_a_number_as_an_id_is_its_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"_id": 12, "text": "a"}, {"_id": "13", "text": "b"}])
    assert list(Texts.open(path, "queries").ids) == ["12", "13"]


def test_queries_keep_their_text_and_take_no_title(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"_id": "1", "title": "no", "text": " a "}])
    assert Texts.open(path, "queries").text(0) == " a "


def test_equal_hashes_are_told_apart_by_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def same(names: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        hashes, words = hash_ids(names)
        return hashes % np.uint64(3), words

    monkeypatch.setattr(texts, "hash_ids", same)
    records = passages(40)
    corpus = Texts.open(write_jsonl(tmp_path / "c.jsonl", records), "corpus")
    assert corpus.rows([record["_id"] for record in records]).tolist() == list(range(40))
    assert corpus.rows(["id-2", "id-3"]).tolist() == [-1, -1]
    records.insert(30, {"_id": "id-9", "text": "again"})
    with pytest.raises(InputError, match=r"d.jsonl:31: the id 'id-9' is already on line 4"):
        Texts.open(write_jsonl(tmp_path / "d.jsonl", records), "corpus")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"_id": "a"}', "no field 'text'"),
        ('{"text": "a"}', "no field '_id'"),
        ('{"_id": "a", "text": null}', "'text' is not a string"),
        ('{"_id": null, "text": "a"}', "'_id' is not a string"),
        ('{"_id": true, "text": "a"}', "'_id' is not a string"),
        ('{"_id": "a", "text": "a"', "not valid JSON"),
        ('"a"', "a JSON string"),
        ('{"_id": "id-4", "text": "a"}', "already on line 3"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, what: str) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", passages(5))
    path.write_text(path.read_text() + "\n" + line + "\n" + '{"_id": "z", "text": ""}\n')
    with pytest.raises(InputError) as caught:
        Texts.open(path, "corpus")
    assert caught.value.where == f"{path}:7"
    assert what in caught.value.what


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_texts(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match="holds no texts"):
        Texts.open(tmp_path / "c.jsonl", "corpus")


def test_small_files_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    before = set(folder.iterdir())
    Texts.open(folder / "corpus.jsonl", "corpus")
    assert set(folder.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_the_index_is_kept_and_rebuilt_when_the_file_changes(
    tmp_path: Path, cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", passages(30))
    built = []
    original = texts._build
    monkeypatch.setattr(texts, "_build", lambda *args: built.append(1) or original(*args))
    first, second = Texts.open(path, "corpus"), Texts.open(path, "corpus")
    assert len(built) == 1
    assert list(first.ids) == list(second.ids)
    assert second.rows(["id-81", "id-82"]).tolist() == [9, -1]
    [index] = tmp_path.glob(".c.jsonl.*.idx")

    write_jsonl(path, passages(31))
    assert len(Texts.open(path, "corpus")) == 31
    index.write_bytes(index.read_bytes()[:-10])  # cut short, as by a full disk
    assert len(Texts.open(path, "corpus")) == 31
    index.write_bytes(b"something else")
    assert Texts.open(path, "corpus").row("id-900") == 30
    assert len(built) == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_the_index_goes_to_the_cache_folder_when_the_file_lies_where_nothing_can_be_written(
    tmp_path: Path, cached: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "data" / "c.jsonl", passages(30))
    original = mapped.write_arrays

    def refuse(target: Path, *rest: object) -> None:  # the tests may run as root, whom no permission stops
        if target.parent == path.parent:
            raise PermissionError(13, "Permission denied", str(target))
        original(target, *rest)

    monkeypatch.setattr(mapped, "write_arrays", refuse)
    assert len(Texts.open(path, "corpus")) == 30
    assert [p.name for p in path.parent.iterdir()] == ["c.jsonl"]
    assert list((tmp_path / "cache" / "indexes").glob("*.idx"))
    monkeypatch.setenv("LEAD_DS_CACHE", "/proc/nowhere")
    assert len(Texts.open(path, "corpus")) == 30  # in memory


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_gz(tmp_path: Path, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "MIN_CACHED_BYTES", least)
    plain = write_jsonl(tmp_path / "plain.jsonl", passages(30))
    zipped = tmp_path / "c.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    corpus = Texts.open(tmp_path / "c.jsonl", "corpus")
    expected = Texts.open(plain, "corpus")
    assert corpus.texts(range(30)) == expected.texts(range(30))
    decompressed = list((tmp_path / "cache" / "texts").glob("*"))
    assert len(decompressed) == (least == 0)
    plain.write_text("".join(plain.read_text().splitlines(keepends=True)[:20]))
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert len(Texts.open(zipped, "corpus")) == 20
    assert len(list((tmp_path / "cache" / "texts").glob("*"))) == (least == 0)  # the old one is gone
    zipped.write_bytes(zipped.read_bytes()[:-30])
    with pytest.raises(InputError, match="cannot be read"):
        Texts.open(zipped, "corpus")


def test_pickled_stores_open_the_file_again(folder: Path) -> None:
    corpus = Texts.open(folder / "corpus.jsonl", "corpus")
    data = pickle.dumps(corpus)
    assert len(data) < 1000
    assert pickle.loads(data).texts([1, 2]) == corpus.texts([1, 2])


def _open_once(path: Path, marks: Path) -> None:
    mapped.MIN_CACHED_BYTES = 0
    original = texts._build
    texts._build = lambda *args: (marks / str(os.getpid())).touch() or original(*args)
    assert len(Texts.open(path, "corpus")) == 20_000


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", passages(20_000))
    marks = tmp_path / "marks"
    marks.mkdir()
    processes = [multiprocessing.get_context("fork").Process(target=_open_once, args=(path, marks)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(marks.iterdir())) == 1


def test_the_standard_librarys_parser_serves_where_orjson_is_missing(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "d")
    script = (
        "import sys; sys.modules['orjson'] = None\n"
        "from lead_ds.io import jsonl; from lead_ds.data.collections.texts import Texts\n"
        "assert jsonl.loads.__module__ == 'lead_ds.io.jsonl'\n"
        f"corpus = Texts.open({str(folder / 'corpus.jsonl')!r}, 'corpus')\n"
        "print(len(corpus), corpus.text(1)[:7])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["60", "Octopus"]
