"""Bad input to the retrieval commands: status 2, one line that says where, what and what to do, nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lead_ds.cli.main import main
from tests.helpers.rooms import save_bert

pytest.importorskip("faiss")


def lead_ds(*arguments: object) -> tuple[int, str]:
    """Status and standard error of a command, run in this process."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        main([str(x) for x in arguments])
    return int(end.value.code or 0), told.getvalue()


@pytest.fixture(scope="module")
def made(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `model`, `vectors`, `index` and `run`, made by the commands themselves."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(rooms / "data", root / "data")
    shutil.copytree(rooms / "student", root / "model")
    for command in (
        ("encode", "--model", root / "model", "--data", root / "data", "--out", root / "vectors"),
        ("index", "--vectors", root / "vectors", "--data", root / "data", "--out", root / "index"),
        (
            "search",
            "--model",
            root / "model",
            "--index",
            root / "index",
            "--data",
            root / "data",
            "--split",
            "dev",
            "--out",
            root / "run",
        ),
    ):
        status, told = lead_ds(*command)
        assert status == 0, told
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to do harm to."""
    return Path(shutil.copytree(made, tmp_path / "here"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def first_line(path: Path) -> list[str]:
    return path.read_text().splitlines()[0].split()


def another_corpus(here: Path) -> None:
    text = (here / "data" / "corpus.jsonl").read_text()
    (here / "data" / "corpus.jsonl").write_text(text.replace("octopus", "octopod"))


def longer_corpus(here: Path) -> None:
    append(here / "data" / "corpus.jsonl", '{"_id": "new", "title": "", "text": "new"}\n')


def wider_model(here: Path) -> None:
    shutil.rmtree(here / "model")
    save_bert(here / "model", layers=1, width=32)


def other_weights(here: Path) -> None:
    shutil.rmtree(here / "model")
    save_bert(here / "model", layers=3, width=16, seed=9)


def other_pooling(here: Path) -> None:
    edit_json(here / "index" / "index.json", lambda tree: tree["model"].update(pooling="mean"))


def other_prompt(here: Path) -> None:
    edit_json(here / "index" / "index.json", lambda tree: tree.update(prompt="passage: "))


def index_of_another(here: Path) -> None:
    edit_json(here / "index" / "index.json", lambda tree: tree.update(dimension=17))


def other_queries(here: Path) -> None:
    (here / "qrels").write_text("nobody\tp1\t1\n")


def no_judgements(here: Path) -> None:
    (here / "qrels").write_text("query-id\tcorpus-id\tscore\n")


def unasked_query(here: Path) -> None:
    append(here / "data" / "qrels" / "dev.tsv", "q999\tp1\t1\n")


def second_rank(here: Path) -> None:
    query, _, _, rank, *_ = first_line(here / "run")
    append(here / "run", f"{query} Q0 unheard-of {rank} 0.5 x\n")


def second_result(here: Path) -> None:
    query, _, passage, *_ = first_line(here / "run")
    append(here / "run", f"{query} Q0 {passage} 9999 0.5 x\n")


def nan_score(here: Path) -> None:
    append(here / "run", "q1 Q0 p1 9999 nan x\n")


def no_rank(here: Path) -> None:
    append(here / "run", "q1 Q0 p1 first 0.5 x\n")


def nothing(here: Path) -> None:
    pass


SEARCH = "search --model model --data data --index index --split dev --out out"
INDEX = "index --vectors vectors --out out"
MINE = "mine --data data --out out"
EVALUATE = "evaluate --run run --qrels data/qrels/dev.tsv --json out"
OF_INDEX = "evaluate --model model --data data --index index --split dev --out out"
COMPARE = "compare run run --qrels data/qrels/dev.tsv --json out"

# What is done to a folder of good things, the command, and what it must say.
CASES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "qrels of other queries": (
        other_queries,
        "evaluate --run run --qrels qrels --json out",
        ["no query that is judged"],
    ),
    "qrels without judgements": (no_judgements, "evaluate --run run --qrels qrels --json out", ["holds no judgements"]),
    "qrels of a query without text": (unasked_query, SEARCH, ["dev.tsv:", "q999", "queries.jsonl"]),
    "to evaluate a query without text": (
        unasked_query,
        "evaluate --model model --data data --split dev --json out",
        ["q999"],
    ),
    "to mine for a query without text": (unasked_query, MINE + " --split dev", ["q999"]),
    "run with a rank twice": (second_rank, EVALUATE, ["run:", "rank 1 of query", "twice"]),
    "run with a passage twice": (second_result, EVALUATE, ["run:", "listed twice"]),
    "run with a NaN score": (nan_score, EVALUATE, ["run:", "not a run line"]),
    "run without ranks": (no_rank, EVALUATE, ["run:", "not a run line"]),
    "comparing a run with a rank twice": (second_rank, COMPARE, ["rank 1 of query"]),
    "mining from a run with a NaN score": (nan_score, MINE + " --run run --split dev", ["not a run line"]),
    "index of another width": (wider_model, SEARCH, ["index", "another model", "dimension 16, here 32"]),
    "index of other weights": (other_weights, SEARCH, ["index", "another model", "checksum"]),
    "index of another pooling": (other_pooling, SEARCH, ["index", "pooling mean, here cls"]),
    "index of another prompt": (other_prompt, SEARCH, ["index", "prompt 'passage: '"]),
    "index that does not fit its file": (index_of_another, SEARCH, ["do not belong together"]),
    "to evaluate an index of other weights": (other_weights, OF_INDEX, ["index", "another model", "checksum"]),
    "to evaluate an index of another corpus": (another_corpus, OF_INDEX, ["corpus.jsonl", "encode and index it again"]),
    "to evaluate an index of cells that it lacks": (nothing, OF_INDEX + " --nprobe 4", ["Flat index has no nprobe"]),
    "to rerank what an index finds": (nothing, OF_INDEX + " --depth 9", ["--index", "reranking"]),
    "an unknown layout": (nothing, SEARCH + " --layout both", ["--layout", "'both' is unknown", "shard or replicate"]),
    "an index read at fewer dimensions": (
        nothing,
        OF_INDEX + " --dim 8",
        ["dim: is 8", "vectors of 16", "leave it out"],
    ),
    "vectors that score themselves": (
        nothing,
        INDEX + " --rescore vectors",
        ["--rescore", "is what the index itself is made of"],
    ),
    "a setting of no model": (nothing, INDEX + " pooling=mean", ["pooling=mean", "add --query-model"]),
    "a setting of neither of two models": (
        nothing,
        "evaluate --query-model model --document-model model --data data pooling=mean",
        ["pooling=mean", "write query.pooling=mean or document.pooling=mean"],
    ),
    "a setting of the model that made the index": (
        nothing,
        SEARCH.replace("--model model", "--query-model model --document-model model") + " --set document.pooling=mean",
        ["document.pooling=mean", "that model made the index", "lead-ds encode"],
    ),
    "cells of no index": (nothing, EVALUATE + " --nprobe 4", ["--nprobe", "add --index"]),
    "an index without a model": (nothing, EVALUATE + " --index index", ["--index", "add --model"]),
    "unknown factory string": (nothing, INDEX + " --factory IFV16,Flat", ["factory", "'IFV16,Flat'"]),
    "factory for more vectors": (nothing, INDEX + " --factory IVF4096,Flat", ["factory", "60 vectors cannot train"]),
    "k beyond the index": (nothing, SEARCH + " -k 61", ["61 results requested of 60 passages"]),
    "k beyond the corpus": (
        nothing,
        "search --model nowhere --data data --out out --split dev -k 61",  # before any model is looked for
        ["-k: 61 results", "data/corpus.jsonl (use at most 60)"],
    ),
    "depth beyond the corpus": (
        nothing,
        MINE + " --depth 61",
        ["--depth: 61 results", "of 60 passages in ", "data/corpus.jsonl", "at most 60"],
    ),
    "depth below what is wanted": (
        nothing,
        MINE + " --depth 9 --number 7 --skip 3",
        ["mine: depth", "skip + number", "9"],
    ),
    "words in common beyond all": (nothing, MINE + " --similar 1.5", ["mine: similar", "1.5"]),
    "lengths that leave nothing to search": (
        nothing,
        "search --model model --data data --set passage_length=2 hello",
        ["passage_length: is 2, and all passages"],
    ),
    "lengths that leave nothing to encode": (
        nothing,
        "encode --model model --data data --out out passage_length=2",
        ["passage_length: is 2, and all passages"],
    ),
    "lengths that leave nothing to score": (
        nothing,
        MINE + " --split dev --rescore model --rescore-set query_length=2",
        ["query_length: is 2, and all queries"],
    ),
    "unknown sample": (nothing, MINE + " --sample best", ["mine: sample", "'top', 'random' or 'stratified'", "best"]),
    "corpus changed before search": (another_corpus, SEARCH, ["index", "corpus.jsonl", "encode and index it again"]),
    "corpus grown before search": (longer_corpus, SEARCH, ["index", "corpus.jsonl", "encode and index it again"]),
    "corpus changed before index": (another_corpus, INDEX + " --data data", ["vectors", "corpus.jsonl", "encode"]),
    "corpus changed before encode goes on": (
        another_corpus,
        "encode --model model --data data --out vectors",
        ["another data"],
    ),
    "unknown measure": (nothing, COMPARE + " --measures nDGC@10", ["'nDGC@10' is unknown"]),
    "no such run": (nothing, "compare run nowhere --qrels data/qrels/dev.tsv --json out", ["nowhere", "no such file"]),
    "export to nothing known": (nothing, "export --model model --to tflite out", ["--to", "'tflite'", "onnx"]),
    "export of what is no model": (nothing, "export --model data --to onnx out", ["data", "config.json"]),
    "export of another split": (nothing, "export --model model --to onnx --data data --split x out", ["x.tsv"]),
    "upload unasked": (nothing, "push --model model --repo me/model", ["--yes-upload", "nothing was uploaded"]),
    "upload of no model": (nothing, "push --model data --repo me/model --yes-upload", ["data", "no config.json"]),
}


@pytest.mark.parametrize("name", CASES)
def test_told_in_one_line_and_nothing_written(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    harm, command, says = CASES[name]
    harm(here)
    monkeypatch.chdir(here)
    before = sorted(here.rglob("*"))
    status, told = lead_ds(*command.split())
    assert status == 2, told
    told = "".join(
        line for line in told.splitlines(True) if not line.startswith("model: dual_encoder; ")
    )  # how it is read
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1, told
    assert "(" in told, f"no remedy in: {told}"
    for words in says:
        assert words in told
    assert sorted(here.rglob("*")) == before
