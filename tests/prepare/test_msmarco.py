"""MS MARCO's published files: columns, tabs and blanks, archives, triples and candidates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError
from lead_ds.settings.data import DataConfig
from tests.prepare import official
from tests.prepare.official import PASSAGES, QRELS, QUERIES, TRIPLES, document_files, passage_files, read, rows, tsv

Run = Callable[..., Path]
ALL_QUERIES = {name: text for queries in QUERIES.values() for name, text in queries.items()}


def check_passages(out: Path) -> None:
    assert [(r["_id"], r["title"], r["text"]) for r in read(out / "corpus.jsonl")] == [
        (name, "", text) for name, text in PASSAGES.items()
    ]
    assert {r["_id"]: r["text"] for r in read(out / "queries.jsonl")} == ALL_QUERIES
    for split, judged in QRELS.items():
        assert rows(out / "qrels" / f"{split}.tsv") == [(q, p, str(score)) for q, p, score in judged]
        assert Dataset.open(out).qrels(split)
    assert Dataset.open(out).splits == sorted(QRELS)


def test_passage_files_are_read_as_they_are(tmp_path: Path, run: Run) -> None:
    out = run("msmarco-passage", official.write(tmp_path / "src", passage_files()))
    check_passages(out)
    groups = {group["query_id"]: group for group in read(out / "train.jsonl")}
    assert groups == {
        "1185869": {"query_id": "1185869", "positives": ["0", "1"], "negatives": []},
        "15": {"query_id": "15", "positives": ["10"], "negatives": []},
    }
    assert len(open_groups(DataConfig(path=str(out), train="train.jsonl", negatives=3))) == 2


@pytest.mark.parametrize("form", ["gz", "tar.gz", "two tars", "tar of gz", "zip"])
def test_archives_give_the_same(tmp_path: Path, run: Run, form: str) -> None:
    import zipfile

    files = passage_files()
    plain = run("msmarco-passage", official.write(tmp_path / "plain", files), "expected")
    if form == "gz":
        src = official.write(tmp_path / "src", {f"{name}.gz": content for name, content in files.items()})
    elif form == "tar.gz":
        src = official.write_tar(tmp_path / "collectionandqueries.tar.gz", files)
    elif form == "two tars":
        src = tmp_path / "src"
        qrels = {name: content for name, content in files.items() if name.startswith("qrels")}
        official.write(src, qrels)
        official.write_tar(src / "collection.tar.gz", {"collection.tsv": files["collection.tsv"]})
        queries = {name: content for name, content in files.items() if name.startswith("queries")}
        official.write_tar(src / "queries.tar.gz", queries)
    elif form == "tar of gz":
        src = official.write_tar(tmp_path / "x.tar", {f"x/{name}.gz": c for name, c in files.items()}, "w")
    else:
        src = tmp_path / "x.zip"
        with zipfile.ZipFile(src, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(f"msmarco/{name}", content)
    assert official.tree(run("msmarco-passage", src)) == official.tree(plain)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_triples_make_groups(tmp_path: Path, run: Run, ending: str) -> None:
    files = {**passage_files(), f"qidpidtriples.train.full.2.tsv{ending}": tsv(TRIPLES)}
    out = run("msmarco-passage", official.write(tmp_path / "src", files))
    assert read(out / "train.jsonl") == [
        {"query_id": "1185869", "positives": ["0", "1"], "negatives": ["2", "8841822"]},
        {"query_id": "15", "positives": ["10"], "negatives": ["0", "7067032"]},
    ]
    assert not (out / ".prepare-parts").exists()
    few = run("msmarco-passage", tmp_path / "src", "few", negatives=1)
    assert [group["negatives"] for group in read(few / "train.jsonl")] == [["2"], ["0"]]
    none = run("msmarco-passage", tmp_path / "src", "none", triples=False)
    assert [group["negatives"] for group in read(none / "train.jsonl")] == [[], []]


def test_candidates_of_passages_are_negatives(tmp_path: Path, run: Run) -> None:
    top = [("15", p, ALL_QUERIES["15"], PASSAGES[p]) for p in ("1", "10", "8841822")]
    out = run("msmarco-passage", official.write(tmp_path / "src", {**passage_files(), "top1000.train.txt": tsv(top)}))
    assert {g["query_id"]: g["negatives"] for g in read(out / "train.jsonl")} == {"1185869": [], "15": ["1", "8841822"]}


def test_document_files(tmp_path: Path, run: Run) -> None:
    out = run("msmarco-doc", official.write(tmp_path / "src", document_files()))
    assert [(r["_id"], r["title"], r["text"]) for r in read(out / "corpus.jsonl")] == [
        (name, title, body) for name, (_, title, body) in official.DOCUMENTS.items()
    ]
    assert rows(out / "qrels" / "train.tsv") == [("3", "D301595", "1"), ("5", "D1359209", "1")]
    assert rows(out / "qrels" / "dev.tsv") == [("2", "D1555982", "1")]
    assert read(out / "train.jsonl") == [
        {"query_id": "3", "positives": ["D301595"], "negatives": ["D1555982"]},
        {"query_id": "5", "positives": ["D1359209"], "negatives": ["D301595"]},
    ]


def test_version_2_shards(tmp_path: Path, run: Run) -> None:
    def shard(names: list[str]) -> bytes:
        records = [{"pid": n, "passage": f"text of {n}", "spans": "(0,5)", "docid": "msmarco_doc_00_0"} for n in names]
        return "".join(json.dumps(record) + "\n" for record in records).encode()

    src = tmp_path / "src"
    first, second = ["msmarco_passage_00_0", "msmarco_passage_00_172"], ["msmarco_passage_01_0"]
    official.write(
        src,
        {
            "passv2_train_queries.tsv": tsv([("121352", "define extreme")]),
            "passv2_train_qrels.tsv": tsv([("121352", 0, "msmarco_passage_01_0", 1)]),
        },
    )
    members = {"msmarco_v2_passage/msmarco_passage_01.gz": shard(second)}
    members = {**members, "msmarco_v2_passage/msmarco_passage_00.gz": shard(first)}
    official.write_tar(src / "msmarco_v2_passage.tar", members, "w")
    out = run("msmarco-passage", src)
    assert [r["_id"] for r in read(out / "corpus.jsonl")] == first + second
    assert read(out / "train.jsonl")[0]["positives"] == second


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("collection.tsv", b"0\tfine\nno tab here\n", "collection.tsv:2: not an id and a text"),
        ("collection.tsv", b"0\tfine\n1\tcut \xe6\x97\n", "collection.tsv:2: not UTF-8"),
        ("collection.tsv", b"0\tfine\n1\tone\n0\tagain\n", "the id '0' is already on line 1"),
        ("qrels.train.tsv", b"15\t0\t10\n15 0 10 x\n", "qrels.train.tsv:2: not a judgement"),
        ("qrels.train.tsv", b"15\t0\t10\tyes\n", "qrels.train.tsv:1: not a judgement"),
        ("qrels.train.tsv", b"", "holds no judgements"),
        ("queries.eval.tsv", b"15\tanother text\n", "query '15' has another text"),
        ("qidpidtriples.train.full.2.tsv", b"15\t10\t0\n15\t10\n", "full.2.tsv:2: not a training pair"),
        ("qidpidtriples.train.full.2.tsv", b"15\t10\t0\n15\t10\t4\n", "1 passage ids are not in corpus.jsonl: '4'"),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, run: Run, name: str, content: bytes, told: str) -> None:
    src = official.write(tmp_path / "src", {**passage_files(), name: content})
    with pytest.raises(InputError) as error:
        run("msmarco-passage", src)
    assert told in str(error.value)
    official.write(src, passage_files())
    for leftover in src.glob("qid*"):
        leftover.unlink()
    check_passages(run("msmarco-passage", src))  # the same command goes on once the file is right


@pytest.mark.parametrize("cut", ["collection.tsv.gz", "collectionandqueries.tar.gz"])
def test_a_cut_archive_is_told(tmp_path: Path, run: Run, cut: str) -> None:
    import random

    files = {**passage_files(), "collection.tsv": tsv((i, random.Random(i).random()) for i in range(20_000))}
    src = tmp_path / "src"
    if cut.endswith(".tar.gz"):
        src.mkdir()
        official.write_tar(src / cut, files)
    else:
        official.write(src, {f"{name}.gz": content for name, content in files.items()})
    whole = (src / cut).read_bytes()
    (src / cut).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        run("msmarco-passage", src)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"queries.dev.tsv": b"2\tx\n"}, "has no collection of msmarco-passage"),
        ({"collection.tsv": b"2\tx\n"}, "has no queries of msmarco-passage"),
        ({}, "holds no files"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path: Path, run: Run, files: dict[str, bytes], told: str) -> None:
    with pytest.raises(InputError, match=told):
        run("msmarco-passage", official.write(tmp_path / "src", files))
    assert not (tmp_path / "out").exists()
