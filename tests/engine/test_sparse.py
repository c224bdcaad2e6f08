"""A sparse student: trained by relevance and FLOPS, served by sentence-transformers, searched by sparse products."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lead_ds.config import load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder, load_scorer
from lead_ds.plan.requirements import requirements
from lead_ds.retrieval.encoded import make_run
from lead_ds.retrieval.evaluate import Task, evaluate_model
from lead_ds.retrieval.evaluate_small import evaluate_small
from lead_ds.retrieval.exact import exact_search
from lead_ds.retrieval.metrics import score_run
from lead_ds.retrieval.mine import MineSettings, mine
from lead_ds.retrieval.search import Searcher
from lead_ds.retrieval.sparse import SparseVectors, finite_rows
from lead_ds.teachers.teach import teach
from tests.engine.jobs import losses_of
from tests.engine.running import copy_run
from tests.models.tiny_models import tiny_model

LOSSES: dict[str, Any] = {"contrastive": {"weight": 1.0}, "response": {"weight": 1.0}, "layer": {"weight": 0.0}}
TEXTS = ["what is a river", "the river runs past a long wall and into the sea", "stone"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked language model without dropout."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_model(tmp_path_factory.mktemp("masked"), "bert", "masked", layers=2, **quiet)


def run_of(configure: Callable[..., Path], masked: str, name: str = "run", **sections: Any) -> Path:
    student = {"kind": "sparse", "path": masked, **sections.pop("student", {})}
    losses = {**LOSSES, **sections.pop("losses", {})}
    return configure(name, student=student, losses=losses, **sections)


def test_a_run_makes_what_sentence_transformers_reads_and_flops_make_it_sparse(
    configure: Callable[..., Path], masked: str, tmp_path: Path
) -> None:
    from sentence_transformers import SparseEncoder

    terms: dict[str, float] = {}
    for name, weight in (("free", 1e-9), ("drawn", 0.1)):
        train = {"steps": 6, "batch_size": 4, "lr": 5e-3, "evaluate_every": 0}
        path = run_of(configure, masked, name, losses={"flops": {"weight": weight, "queries": 0.5}}, train=train)
        distill(load_config(path), quiet=True)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        terms[name] = [row for row in rows if "parts" in row][-1]["parts"]["terms_passages"]
    assert terms["drawn"] < 0.8 * terms["free"]
    student = tmp_path / "drawn" / "student"
    scorer, encoder = load_encoder(student)
    theirs = SparseEncoder(str(student), device="cpu")
    assert scorer.name == "sparse"
    for ours, says in ((encoder.queries, theirs.encode_query), (encoder.passages, theirs.encode_document)):
        with torch.no_grad():
            torch.testing.assert_close(scorer.embed(ours(TEXTS)), says(TEXTS).to_dense(), atol=2e-5, rtol=0)


def test_flops_grow_over_steps_and_over_a_resumed_run(
    configure: Callable[..., Path], masked: str, tmp_path: Path
) -> None:
    flops = {"weight": 0.5, "warmup_steps": 4}
    train = {"steps": 6, "batch_size": 4, "evaluate_every": 0, "save_every": 2, "keep": 3}
    path = run_of(configure, masked, losses={"response": {"weight": 0.0}, "flops": flops}, train=train)
    distill(load_config(path), quiet=True)

    def shares(folder: Path) -> list[float]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [
            (row["loss"] - row["parts"]["contrastive"]) / (0.5 * row["parts"]["flops"])
            for row in rows
            if "parts" in row
        ]

    assert shares(tmp_path / "run") == pytest.approx([1 / 16, 4 / 16, 9 / 16, 1, 1, 1], rel=1e-4)
    distill(load_config(copy_run(path, "half", step=2)), resume=True, quiet=True)
    assert losses_of(tmp_path / "half") == losses_of(tmp_path / "run")


def test_it_is_a_teacher_in_packed_rows_too(configure: Callable[..., Path], masked: str, tmp_path: Path) -> None:
    losses = []
    for name, passes in (("rows", None), ("packed", "packed")):
        teacher = {"kind": "sparse", "path": masked}
        train = {"steps": 2, "batch_size": 4, "evaluate_every": 0}
        path = run_of(configure, masked, name, student={"passes": passes}, extra_teacher=teacher, train=train)
        distill(load_config(path), quiet=True)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "parts" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_its_relevance_is_cached(configure: Callable[..., Path], masked: str, tmp_path: Path) -> None:
    train = {"steps": 1, "batch_size": 4, "evaluate_every": 0}
    teacher = {"kind": "sparse", "path": masked, "scale": "none"}
    config = load_config(run_of(configure, masked, extra_teacher=teacher, train=train))
    cache = teach(config, tmp_path / "cache", epochs=1, quiet=True)
    assert cache.num_layers == 0  # and its final state
    tree = yaml.safe_load((tmp_path / "run.yaml").read_text())
    tree["teacher"] = {"kind": "cached", "path": str(cache.folder)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    distill(load_config(tmp_path / "run.yaml"), quiet=True)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["parts"]["response"] == pytest.approx(0.0, abs=1e-5)  # it is what the student begins as
    with pytest.raises(InputError, match=r"losses\.layer"):
        distill(
            load_config(tmp_path / "run.yaml", ["losses.layer.weight=1", f"output={tmp_path / 'other'}"]), quiet=True
        )


def test_search_evaluation_and_mining_equal_dense_products(rooms: Path, masked: str, tmp_path: Path) -> None:
    scorer, encoder = opened = load_scorer(masked, "sparse")
    data = Dataset.open(rooms / "data")
    texts = data.corpus.texts(range(len(data.corpus)))
    with torch.no_grad():
        dense = [scorer.embed(encoder.passages(texts)), scorer.embed(encoder.queries(TEXTS))]
    wanted_Qk = (dense[1] @ dense[0].T).topk(5).values
    searcher = Searcher.over_corpus(*opened, data.corpus, quiet=True, batch_size=7)
    assert isinstance(searcher.passages, SparseVectors)
    run = searcher.run(["a", "b", "c"], TEXTS, 5)
    found_Qk = torch.tensor([list(found.values()) for found in run.values()])
    torch.testing.assert_close(found_Qk, wanted_Qk, rtol=1e-5, atol=1e-5)
    assert 0 < evaluate_model(*opened, Task(data, "train"), quiet=True).mean["nDCG@10"] <= 1
    mine(opened, data, tmp_path / "mined.jsonl", settings=MineSettings(number=3, margin=0.0), quiet=True)
    group = json.loads((tmp_path / "mined.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        asked = scorer.embed(encoder.queries(data.queries.texts(data.queries.rows([group["query_id"]]))))[0]
        found = scorer.embed(encoder.passages(data.corpus.texts(data.corpus.rows(list(group["scores"])))))
    assert list(group["scores"].values()) == pytest.approx((found @ asked).tolist(), rel=1e-5)


def test_a_passage_without_a_term_of_the_query_is_not_found() -> None:
    def rows(*dense: list[float]) -> SparseVectors:
        return SparseVectors.of([([1, 0], torch.tensor(dense[::-1]).to_sparse())], 2)

    scores, found = exact_search(rows([1.0, 0.0, 2.0], [0.0, 0.0, 0.0]), rows([0.0, 3.0, 0.0], [1.0, 0.0, 1.0]), 2)
    assert scores.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert found.tolist() == [[1, -1], [-1, -1]]
    assert finite_rows(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]).to_sparse()).tolist() == [True, False]
    run = make_run(["a", "b"], scores.tolist(), found.tolist(), ["x", "y"])
    assert run == {"a": {"y": 3.0}, "b": {}}
    assert score_run(run, {"a": {"y": 1}, "b": {"x": 1}}, ["RR@10"]).mean["RR@10"] == 0.5


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("losses.layer.weight=1", r"losses\.layer\.weight: reads layers .* is read at its final state alone"),
        ("student.dims=[4,8]", r"student\.dims: is ignored by a sparse, whose vectors are sparse"),
        ("student.quantize=binary", r"student\.quantize: is ignored by a sparse"),
        ("losses.flops.weight=1 losses.flops.queries=0 losses.flops.passages=0", "counts neither queries nor passages"),
    ],
)
def test_what_a_sparse_student_has_not_is_refused(
    configure: Callable[..., Path], masked: str, override: str, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        distill(load_config(run_of(configure, masked), override.split()), quiet=True)


def test_a_plan_counts_the_logits(configure: Callable[..., Path], masked: str) -> None:
    def planned(length: int) -> int:
        config = load_config(run_of(configure, masked, student={"passage_length": length}))
        return requirements(config).student_activations(True)

    rows, vocabulary = 4 * 3, 400
    assert planned(96) - planned(48) >= rows * 48 * vocabulary * 2  # of 16 bits at least


def test_its_files_are_read_as_they_say_or_refused(rooms: Path, masked: str, tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder

    told = {
        "no head": (str(rooms / "student"), "sparse", r"lack the language-model head"),
        "kept": (str(tmp_path / "kept"), None, r"keeps 8 weights of a text \(max_active_dims\)"),
        "cosine": (str(tmp_path / "cosine"), None, r"compares sparse vectors by cosine"),
        "dense": (str(tmp_path / "saved"), "dual_encoder", r"its vectors are sparse.*use kind: sparse"),
    }
    for name, more in (("saved", {}), ("kept", {"max_active_dims": 8}), ("cosine", {"similarity_fn_name": "cosine"})):
        SparseEncoder(masked, device="cpu", **more).save_pretrained(str(tmp_path / name), create_model_card=False)
    for path, kind, what in told.values():
        with pytest.raises(InputError, match=what):
            load_scorer(path, kind)
    opened = load_encoder(tmp_path / "saved")
    data = Dataset.open(rooms / "data")
    with pytest.raises(InputError, match="small vectors are made of dense ones"):
        evaluate_small(*opened, Task(data, "train"), ["int8"])
