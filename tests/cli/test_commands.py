"""The commands after a distillation, as a user types them, on a student that a run just made."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.cli.test_bad_input import lead_ds
from tests.helpers.rooms import settings


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: `RUN/student` and all that stands beside it."""
    folder = tmp_path_factory.mktemp("commands")
    student = {"query_prompt": "find: ", "passage_prompt": "text: ", "pooling": "mean"}
    path = folder / "run.yaml"
    tree = settings(rooms, folder / "run", student=student, evaluation={"split": "dev"}, train={"evaluate_every": 3})
    path.write_text(yaml.safe_dump(tree))
    done = ok("distill", str(path))
    assert done.stdout == f"student: {folder / 'run' / 'student'}\n"
    assert "step 6/6" in done.stderr
    return folder / "run"


def ok(*arguments: str) -> subprocess.CompletedProcess:
    done = lead_ds(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_tells_where_it_came_from(run: Path) -> None:
    facts = json.loads((run / "run.json").read_text())
    assert facts["command"][:2] == ["lead-ds", "distill"]
    assert {"torch", "deepspeed", "transformers", "lead-ds", "python"} <= facts["versions"].keys()
    assert facts["kernels"] == "torch"
    assert facts["teacher"]["placement"] == "replicate"
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["losses"]["layer"]["reweight"] is True  # a default, written out


def test_encode_equals_sentence_transformers(run: Path, rooms: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(run / "student"), device="cpu")
    assert model.max_seq_length == 48
    assert model.similarity_fn_name == "cosine"
    corpus = [json.loads(line) for line in (rooms / "data" / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (rooms / "data" / "queries.jsonl").read_text().splitlines()]
    theirs = {
        "corpus": model.encode_document([f"{row['title']} {row['text']}".strip() for row in corpus]),
        "queries": model.encode_query([row["text"] for row in queries]),
    }
    for kind, expected in theirs.items():
        ok(
            "encode",
            "--model",
            str(run / "student"),
            "--data",
            str(rooms / "data"),
            "--out",
            str(run / kind),
            "--kind",
            kind,
        )
        ours = np.concatenate([np.load(path) for path in sorted((run / kind).glob("vectors-*.npy"))])
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_index_search_and_evaluate_agree(run: Path, rooms: Path) -> None:
    student, data = str(run / "student"), str(rooms / "data")
    ok("encode", "--model", student, "--data", data, "--out", str(run / "vectors"))
    ok("index", "--vectors", str(run / "vectors"), "--out", str(run / "index"))
    trec = str(run / "run.trec")
    ok(
        "search",
        "--model",
        student,
        "--data",
        data,
        "--index",
        str(run / "index"),
        "--split",
        "test",
        "-k",
        "60",
        "--out",
        trec,
    )
    by_run = json.loads(ok("evaluate", "--run", trec, "--qrels", f"{data}/qrels/test.tsv", "--json", "-").stdout)
    by_model = json.loads(ok("evaluate", "--model", student, "--data", data, "--json", "-").stdout)
    assert by_run["mean"] == pytest.approx(by_model["mean"], abs=1e-6)
    again = str(run / "again.trec")
    of_index = ("--index", str(run / "index"), "--out", again)
    by_index = json.loads(ok("evaluate", "--model", student, "--data", data, *of_index, "--json", "-").stdout)
    assert by_index["mean"] == pytest.approx(by_run["mean"], abs=1e-6)
    assert Path(again).read_text() == Path(trec).read_text()
    hits = json.loads(ok("search", "--model", student, "--data", data, "-k", "3", "--json", "three hearts").stdout)[
        "hits"
    ]
    assert len(hits) == 3
    assert hits[0]["score"] >= hits[1]["score"] >= hits[2]["score"]
    shown = ok("search", "--model", student, "--data", data, "three hearts").stdout
    assert hits[0]["id"] in shown


@pytest.mark.parametrize("source", ["model", "bm25"])
def test_mine_writes_groups_that_distill_reads(run: Path, rooms: Path, source: str) -> None:
    from lead_ds.data.groups.open import open_groups
    from lead_ds.settings.data import DataConfig

    if source == "bm25":
        pytest.importorskip("bm25s")
    out, data = run / f"{source}.jsonl", rooms / "data"
    model = ["--model", str(run / "student")] if source == "model" else []
    ok("mine", "--data", str(data), "--out", str(out), "--number", "5", "--depth", "60", "--similar", "1", *model)
    groups = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(groups) == 30
    for group in groups:
        # BM25 finds only passages that share a word with the query.
        assert len(group["negatives"]) == 5 if source == "model" else 0 <= len(group["negatives"]) <= 5
        assert not set(group["negatives"]) & set(group["positives"])
    read = open_groups(DataConfig(path=str(data), train=str(out), negatives=5))
    drawn = read.draw(0, 0, 0)
    listed = set(groups[0]["negatives"])
    assert set(drawn.passage_ids[1:]) == listed if source == "model" else listed <= set(drawn.passage_ids[1:])


def test_report(run: Path) -> None:
    page = Path(ok("report", str(run)).stdout.strip())
    html = page.read_text()
    assert html.count("data:image/png;base64,") >= 3
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert {"losses.png", "layers.png", "metrics.png"} <= {path.name for path in page.parent.iterdir()}


def test_student_loads_in_plain_transformers(run: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(run / "student"), AutoTokenizer.from_pretrained(run / "student")
    with torch.no_grad():
        state = model(**tokenizer("find: three hearts", return_tensors="pt")).last_hidden_state
    assert state.shape[-1] == 16
