import gzip
import math
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_qrels, read_run, write_run
from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError, RunError
from lead_ds.retrieval.metrics import score_run
from lead_ds.settings.data import DataConfig


@pytest.mark.parametrize(
    "content",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td 2\t0\nq2\td1\t3\n",
        "q1\td1\t1\nq1\td 2\t0\nq2\td1\t3\n",
        "q1\t0\td1\t1\r\nq1\t0\td 2\t0\r\n\r\nq2\t0\td1\t3\r\n",
    ],
)
def test_beir_and_trec(tmp_path: Path, content: str) -> None:
    (tmp_path / "q.tsv").write_text(content)
    assert read_qrels(tmp_path / "q.tsv") == {"q1": {"d1": 1, "d 2": 0}, "q2": {"d1": 3}}
    (tmp_path / "z.tsv.gz").write_bytes(gzip.compress(content.encode()))
    assert read_qrels(tmp_path / "z.tsv") == read_qrels(tmp_path / "q.tsv")


def test_spaces_between_trec_columns(tmp_path: Path) -> None:
    (tmp_path / "q").write_text("101 Q0  d1   2\n101 Q0 d2 -1\n")
    assert read_qrels(tmp_path / "q") == {"101": {"d1": 2, "d2": -1}}


@pytest.mark.parametrize("line", ["q1\td1", "q1\td1\tx", "q1\td1\t1.5", "q1", "q1 0 d1 1 2", "q1\t\t\t\t1"])
def test_a_bad_judgement_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "q.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\td1\t1\n{line}\n")
    with pytest.raises(InputError, match="not a judgement") as caught:
        read_qrels(tmp_path / "q.tsv")
    assert caught.value.where == f"{tmp_path / 'q.tsv'}:3"
    (tmp_path / "q.tsv").write_text(f"{line}\nq1\td1\t1\n")
    with pytest.raises(InputError, match=":1: not a judgement"):
        read_qrels(tmp_path / "q.tsv")


def test_no_judgements(tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(InputError, match="holds no judgements"):
        read_qrels(tmp_path / "q.tsv")


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_a_run_comes_back_as_it_was_written(tmp_path: Path, name: str) -> None:
    run = {"q1": {"a": 0.1, "b": 1 / 3, "c": -2.0, "d": 1e-30}, "q2": {"a": 5.0}}
    path = tmp_path / "deep" / name
    write_run(path, run, "me")
    assert read_run(path) == run
    content = path.read_bytes()
    lines = (gzip.decompress(content) if name.endswith("gz") else content).decode().splitlines()
    assert [line.split()[2:4] for line in lines[:4]] == [["b", "1"], ["a", "2"], ["d", "3"], ["c", "4"]]
    assert lines[-1] == "q2 Q0 a 1 5.0 me"
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("line", ["q1 Q0 a 1 0.5", "q1 Q0 a 1 x t", "q1 Q0 a 1 nan t", "q1 Q0 a 1 0.5 t t"])
def test_a_bad_run_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "r").write_text(f"q1 Q0 b 1 0.5 t\n{line}\n")
    with pytest.raises(InputError, match=":2: not a run line"):
        read_run(tmp_path / "r")


def test_a_run_lists_a_passage_once(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("q1 Q0 b 1 0.5 t\nq1 Q0 b 2 0.4 t\n")
    with pytest.raises(InputError, match=":2: 'b' is listed twice for query 'q1'"):
        read_run(tmp_path / "r")
    (tmp_path / "r").write_text("")
    with pytest.raises(InputError, match="holds no results"):
        read_run(tmp_path / "r")


@pytest.mark.parametrize("name", ["qrels", "groups"])
def test_a_pair_that_is_judged_twice_and_differently(folder: Path, name: str) -> None:
    path = folder / "qrels" / "dev.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\nq1\tp2\t1\nq1\tp2\t1\nq1\tp1\t0\n")
    with pytest.raises(InputError, match=r"dev.tsv:5: passage 'p1' of query 'q1' is judged 0, and 1 on line 2"):
        read_qrels(path) if name == "qrels" else open_groups(DataConfig(path=str(folder), train="qrels/dev.tsv"))
    path.write_text("q1\tp1\t1\nq1\tp1\t1\n")
    assert read_qrels(path) == {"q1": {"p1": 1}}


@pytest.mark.parametrize("word", ["1_0", "99999999999", "1.0"])
def test_a_judgement_is_an_integer_of_trec_eval(tmp_path: Path, word: str) -> None:
    (tmp_path / "qrels").write_text(f"q\tp\t1\nq\tr\t{word}\n")
    with pytest.raises(InputError, match=":2: not a judgement"):
        read_qrels(tmp_path / "qrels")


def test_a_run_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_run(tmp_path / "file" / "run", {"q": {"a": math.pi}})


def test_dataset(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.splits == ["dev", "test", "train"]
    assert len(dataset.corpus) == 60
    assert dataset.queries.text(dataset.queries.row("q1")) == "which thing is carved from spruce and maple"
    assert dataset.qrels("dev") == {f"q{i}": {f"p{i * 7 % 60}": 1} for i in range(18, 24)}


def test_dataset_names_what_is_missing(folder: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such folder"):
        Dataset.open(folder / "absent")
    with pytest.raises(InputError, match="is a file"):
        Dataset.open(folder / "corpus.jsonl")
    with pytest.raises(InputError, match=r"valid.tsv: no such file \(splits here: dev, test, train\)"):
        Dataset.open(folder).qrels("valid")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"corpus.jsonl: no such file"):
        len(Dataset.open(folder).corpus)


@pytest.mark.parametrize(("line", "what"), [("q1\tp99\t0", "passage 'p99'"), ("q99\tp1\t1", "query 'q99'")])
def test_a_judged_id_without_a_text_is_named(folder: Path, line: str, what: str) -> None:
    path = folder / "qrels" / "dev.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=what) as caught:
        Dataset.open(folder).qrels("dev")
    assert caught.value.where == f"{path}:8"


def test_a_gzipped_dataset_reads_the_same(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "zipped"
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        target = other / (str(path.relative_to(folder)) + ".gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(path.read_bytes()))
    plain, zipped = Dataset.open(folder), Dataset.open(other)
    assert zipped.splits == plain.splits
    assert zipped.qrels("test") == plain.qrels("test")
    assert zipped.corpus.texts(range(60)) == plain.corpus.texts(range(60))


def test_a_name_that_ends_early_in_c_is_refused(tmp_path: Path) -> None:
    """trec_eval took two such names for one and ended the process."""
    judged, ranked = tmp_path / "qrels.tsv", tmp_path / "run.trec"
    judged.write_text("q\0a\tp\t1\nq\0b\tp\t1\n")
    ranked.write_text("q\0a Q0 p 1 0.5 x\n")
    with pytest.raises(InputError, match=r"qrels.tsv:1: .*NUL"):
        read_qrels(judged)
    with pytest.raises(InputError, match=r"run.trec:1: .*NUL"):
        read_run(ranked)
    with pytest.raises(InputError, match="NUL"):
        score_run({"q": {"p": 1.0}}, {"q": {"p": 1}, "q\0a": {"p": 1}, "q\0b": {"p": 1}}, ["RR@10"])
