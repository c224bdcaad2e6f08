"""Capturing from ZeRO-3 models on two processes: the numbers of whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lead_ds.models.load import load_encoder
from tests.helpers.launch import launch
from tests.models.reranker_cards import answering
from tests.models.tiny_models import tiny_model, tokens_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family", "saved_as", "pooling"),
    [
        ("dual_encoder", "bert", "base", "cls"),
        ("dual_encoder", "modernbert", "base", "mean"),
        ("dual_encoder", "qwen3", "causal", "last"),  # a checkpoint whose names carry the prefix of a head
        ("colbert", "modernbert", "base", "auto"),
        ("cross_encoder", "roberta", "classifier", "auto"),
        ("cross_encoder", "bert", "classifier", "auto"),
        ("llm_reranker", "llama", "causal", "auto"),
        ("llm_reranker", "t5", "seq2seq", "auto"),
    ],
)
def test_a_sharded_teacher_says_what_a_whole_one_says(
    tmp_path: Path, kind: str, family: str, saved_as: str, pooling: str
) -> None:
    path = (
        answering(tmp_path, "t5", ("y", "n"), tied=True) if family == "t5" else tiny_model(tmp_path, family, saved_as)
    )
    for answer in launch("tests.models.zero3_jobs:teacher", 2, path=path, kind=kind, pooling=pooling):
        assert answer["sharded"]
        assert answer["equal"]
        assert answer["left"] == 0, "every parameter is given back after a forward pass"


@pytest.mark.slow
def test_random_weights_are_built_sharded(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama")
    answers = launch(
        "tests.models.zero3_jobs:teacher", 2, path=path, kind="dual_encoder", pooling="last", weights="random"
    )
    assert all(answer["sharded"] for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pooling", "checkpointing"), [("bert", "cls", True), ("modernbert", "mean", False)])
def test_a_sharded_student_takes_the_steps_of_a_whole_one(
    tmp_path: Path, family: str, pooling: str, checkpointing: bool
) -> None:
    path = tiny_model(tmp_path / "origin", family)
    answers = launch(
        "tests.models.zero3_jobs:student",
        2,
        path=path,
        pooling=pooling,
        checkpointing=checkpointing,
        folder=str(tmp_path / "saved"),
    )
    assert all(answer["worst"] < 1e-5 for answer in answers)
    assert answers[0]["losses"] != answers[1]["losses"]
    scorer, _ = load_encoder(str(tmp_path / "saved"))
    with torch.no_grad():
        assert scorer.embed(tokens_of((3, 5))).shape == (2, 8)
