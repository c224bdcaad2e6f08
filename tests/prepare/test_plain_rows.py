"""Local tables are read as they are written, and what is written can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.prepare.build import prepare
from lead_ds.prepare.hf import open_hf
from lead_ds.prepare.plain_rows import plain_rows


def texts(folder: Path, name: str) -> dict[str, str]:
    return {record["_id"]: record["text"] for record in map(json.loads, (folder / name).read_text().splitlines())}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A retrieval dataset of TSV files, with everything that a reader which guesses makes something else of."""
    source = tmp_path / "source"
    rows = ['001\tan unclosed " quote', "1\tNA", "2\tnull", "1e3\t  12  ", "True\t2020-01-01", "nan\t'x'"]
    for name, lines in (
        ("corpus", ["_id\ttext", *rows]),
        ("queries", ["_id\ttext", '007\t"quoted"', "7\tNaN"]),
        ("qrels", ["query-id\tcorpus-id\tscore", "007\t001\t1", "7\t1\t2"]),
    ):
        (source / name).mkdir(parents=True)
        (source / name / "test.tsv").write_text("\n".join(lines) + "\n")
    return source


def test_a_tsv_is_taken_at_its_word(tables: Path, tmp_path: Path) -> None:
    prepare(open_hf(str(tables)), tmp_path / "out", shown=False)
    assert texts(tmp_path / "out", "corpus.jsonl") == {
        "001": 'an unclosed " quote',
        "1": "NA",
        "2": "null",
        "1e3": "  12  ",
        "True": "2020-01-01",
        "nan": "'x'",
    }
    assert texts(tmp_path / "out", "queries.jsonl") == {"007": '"quoted"', "7": "NaN"}
    assert Dataset.open(tmp_path / "out").qrels("test") == {"007": {"001": 1}, "7": {"1": 2}}


def test_tables_beside_each_other_are_a_collection_too(tables: Path, tmp_path: Path) -> None:
    """Not training rows, whose first column would be a query: `_id` and `text` would make passages of ids."""
    for name in ("corpus", "queries"):
        (tables / name / "test.tsv").rename(tables / f"{name}.tsv")
        (tables / name).rmdir()
    prepare(open_hf(str(tables)), tmp_path / "out", shown=False)
    assert len(texts(tmp_path / "out", "corpus.jsonl")) == 6
    assert Dataset.open(tmp_path / "out").qrels("test") == {"007": {"001": 1}, "7": {"1": 2}}
    with pytest.raises(InputError, match=r"the column '_id' holds ids, and training rows hold texts"):
        open_hf(str(tables / "corpus.tsv"))


def test_nothing_beside_what_is_read_is_passed_over(tmp_path: Path) -> None:
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text("query\tpositive\nx\ty\n")
    with pytest.raises(InputError, match=r"has no train among its splits: a, b .name the file of one"):
        open_hf(str(tmp_path))
    (tmp_path / "train.tsv.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"train\.tsv\.gz: is compressed"):
        open_hf(str(tmp_path))


def test_training_rows_keep_their_labels_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("query\tpassage\tlabel\n001\tNA\t1\n001\tnull\t0\n002\tx\t1\n")
    prepare(open_hf(str(tmp_path / "train.tsv")), tmp_path / "out", shown=False)
    assert sorted(texts(tmp_path / "out", "queries.jsonl").values()) == ["001", "002"]
    assert sorted(texts(tmp_path / "out", "corpus.jsonl").values()) == ["NA", "null", "x"]


def test_csv_quotes_hold_lines_and_must_be_closed(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('query,positive\n"a ""b""\nc",001\n')
    assert list(plain_rows([path])) == [{"query": 'a "b"\nc', "positive": "001"}]
    path.write_text('query,positive\n"a,001\nb,2\n')
    with pytest.raises(InputError, match=r"train.csv:3: is not CSV: unexpected end of data"):
        list(plain_rows([path]))


def test_a_row_of_other_columns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("query\tpositive\na\tb\na\tb\tc\n")
    with pytest.raises(InputError, match=r"train.tsv:3: 3 fields, the first line names 2 columns"):
        list(plain_rows([path]))


@pytest.mark.parametrize("name", [" a", "a\u3000", "a\tb", "a\nb", ""])
def test_an_id_that_judgements_cannot_name_is_refused(tmp_path: Path, name: str) -> None:
    for folder, rows in (
        ("corpus", [{"_id": "p", "text": "x"}]),
        ("queries", [{"_id": name, "text": "x"}]),
        ("qrels", [{"query-id": name, "corpus-id": "p", "score": 1}]),
    ):
        (tmp_path / "source" / folder).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "source" / folder / "test.jsonl").write_text(lines)
    with pytest.raises(InputError, match="qrels cannot name it"):
        prepare(open_hf(str(tmp_path / "source")), tmp_path / "out", shown=False)


def test_a_file_that_is_wrong_at_its_end_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('[{"query": "one", "positive": "x"}, {"query" "two"}]')
    with pytest.raises(InputError, match=r"train\.json: is not JSON"):
        prepare(open_hf(str(tmp_path / "train.json")), tmp_path / "out", shown=False)
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("score", ["NaN", "1e999", "0.5"])
def test_a_judgement_is_a_whole_number(score: str, tables: Path, tmp_path: Path) -> None:
    (tables / "qrels" / "test.tsv").unlink()
    (tables / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n007\t001\t{score}\n")
    with pytest.raises(InputError, match="is not an integer"):
        prepare(open_hf(str(tables)), tmp_path / "out", shown=False)


@pytest.mark.parametrize("form", ["{}\n{}\n", " [{},\n{}]"])
def test_json_is_a_list_or_an_object_a_line(tmp_path: Path, form: str) -> None:
    first, second = {"query": "007", "positive": "NA"}, {"query": "2020-01-01", "positive": "null", "more": [1, "1"]}
    (tmp_path / "train.json").write_text(form.replace("{}", "%s") % (json.dumps(first), json.dumps(second)))
    assert [*plain_rows([tmp_path / "train.json"])] == [first, second]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null", r"train\.json:1: a JSON null"),  # a segmentation fault in PyArrow 26
        ("[null, {}]", r"train\.json: entry 1 is a JSON null"),
        ('[{"query": "a"}', r"train\.json: is not JSON"),
        ("[" * 9999, r"train\.json: is not JSON: nested too deeply"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(InputError, match=message):
        prepare(open_hf(str(tmp_path / "train.json")), tmp_path / "out", shown=False)
