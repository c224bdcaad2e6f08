"""The teacher's index, asked by the student: two models in one space, in one directory, over one index."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lead_ds.cli.main import app
from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder
from lead_ds.models.router import routes
from lead_ds.models.student_dir import save_student
from lead_ds.retrieval.encoded import encode_both
from lead_ds.retrieval.evaluate import Task, open_encoder
from lead_ds.retrieval.search import Searcher
from lead_ds.retrieval.two_models import evaluate_two

DATA = ("--split", "test", "--json")


@pytest.fixture(scope="module")
def student(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 wide, mapped to the teacher's 32 as a kept map would, with a prompt of its own."""
    scorer, encoder = load_encoder(str(rooms / "student"))
    scorer.project(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
    encoder.query_prompt = "ask: "
    return save_student(scorer, encoder, tmp_path_factory.mktemp("two") / "student")


@pytest.fixture(scope="module")
def router(rooms: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("router") / "both"
    run("export", "--model", student, "--document-model", rooms / "bert", "--to", "router", out)
    return out


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_router_loads_in_sentence_transformers(router: Path, student: Path, rooms: Path) -> None:
    from sentence_transformers import SentenceTransformer

    both = SentenceTransformer(str(router), device="cpu")
    texts = ["an owl flies", "what grinds rock"]
    [(asks, asks_text), (reads, reads_text)] = (load_encoder(str(path)) for path in (student, rooms / "bert"))
    with torch.no_grad():
        queries, passages = asks.embed(asks_text.queries(texts)), reads.embed(reads_text.passages(texts))
    torch.testing.assert_close(both.encode_query(texts, convert_to_tensor=True), queries, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.encode_document(texts, convert_to_tensor=True), passages, atol=1e-5, rtol=0)
    assert both.prompts["query"] == "ask: "
    with pytest.raises(InputError, match="holds two models"):
        load_encoder(str(router))


def test_by_directory_by_two_names_and_by_index(
    router: Path, student: Path, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = rooms / "bert", rooms / "data"
    task = Task(Dataset.open(data), "test", ["nDCG@10"])
    two = [open_encoder(str(path), "cpu") for path in (student, teacher)]
    expected = f"nDCG@10  {evaluate_two(*two, task, quiet=True).mean['nDCG@10']:.4f}"
    asked = ("evaluate", "--data", data, "--split", "test", "--measures", "nDCG@10")
    by_name = ("--query-model", student, "--document-model", teacher)
    assert expected in run(*asked, *by_name)
    assert expected in run(*asked, "--model", router)
    settings = ("query.query_prompt=which: ", "document.passage_length=6")
    own = [
        open_encoder(str(path), "cpu", None, [word.partition(".")[2]])
        for path, word in zip((student, teacher), settings, strict=True)
    ]
    scores = evaluate_two(*own, task, quiet=True).mean["nDCG@10"]
    capsys.readouterr()
    assert f"nDCG@10  {scores:.4f}" in run(*asked, *by_name, *settings)
    search = ("search", "--data", data, *by_name, *(word for setting in settings for word in ("--set", setting)))
    assert "query prompt 'which: '" in (told := run(*search, "--json", "what grinds rock"))
    assert "passage_length 6" in told

    run("encode", "--model", router, "--data", data, "--out", tmp_path / "v")
    run("index", "--vectors", tmp_path / "v", "--out", tmp_path / "i", "--query-model", student)
    index = ("--index", tmp_path / "i")
    assert expected in run(*asked, "--model", router, *index)
    assert expected in run(*asked, "--model", student, *index)  # which the index was made for
    encoded = encode_both(
        two[0][0].embed, two[0][1], task.dataset, ["q0"], quiet=True, documents=(two[1][0].embed, two[1][1])
    )
    best = next(iter(encoded.search(1)["q0"]))
    text = task.dataset.queries.texts([0])[0]
    assert Searcher.open(str(student), data, document_model=str(teacher), quiet=True).search(text, 1)[0].id == best
    assert (
        Searcher.open(routes(router)[0], index=index[1], document_model=routes(router)[1]).search(text, 1)[0].id == best
    )  # type: ignore[index]
    with pytest.raises(InputError, match="was made by another document model"):
        Searcher.open(str(student), index=index[1], document_model=str(rooms / "student"))
    with pytest.raises(InputError, match="gives vectors of 16 dimensions"):
        Searcher.open(str(rooms / "student"), data, document_model=str(teacher), quiet=True)


def test_what_cannot_be_named(router: Path, rooms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --model, or both"):
        run("evaluate", "--data", rooms / "data", "--query-model", rooms / "bert")
    with pytest.raises(InputError, match="goes with --to router"):
        run("export", "--model", rooms / "bert", "--to", "router", tmp_path / "x")
    other = shutil.copytree(router, tmp_path / "other")
    shutil.rmtree(other / "query")
    with pytest.raises(InputError, match="of another form"):
        routes(other)
