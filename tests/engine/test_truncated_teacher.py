"""A teacher without the layers that no loss reads gives the same losses, bit for bit, from less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import TeacherConfig, losses_section
from lead_ds.data.reads import ModelBatch
from lead_ds.models.load import load_teacher, load_text
from tests.helpers.launch import launch
from tests.helpers.rooms import TEACHERS
from tests.models.test_passes import PASSAGES, QUERIES, tensors


def test_losses_and_memory(configure: Callable[..., Path], tmp_path: Path) -> None:
    layer = {"select": "given", "teacher_layers": [0, 2], "student_layers": [0, 2], "layer_temperature": 1.0}
    losses: dict[str, Any] = {"response": {"weight": 0.0}, "layer": layer}
    cases = [("dual_encoder", "zero3"), ("cross_encoder", "replicate")]
    names = [f"{kind}-{truncate}" for kind, _ in cases for truncate in (False, True)]
    paths = []
    for kind, placement in cases:
        for truncate in (False, True):
            teacher = {"placement": placement, "truncate": truncate}
            sections = {"losses": losses, "train": {"steps": 3}, "extra_teacher": teacher}
            paths.append(str(configure(f"{kind}-{truncate}", kind, **sections)))
    [results] = launch("tests.engine.jobs:distil_each", 1, configs=paths)
    held = [json.loads((tmp_path / name / "run.json").read_text())["teacher"]["parameter_bytes"] for name in names]
    for whole, cut in ((0, 1), (2, 3)):
        assert results[cut] == results[whole]
        assert len(set(results[whole])) == 3, results[whole]
        assert held[cut] < held[whole]


@pytest.mark.parametrize("kind", TEACHERS)
def test_its_layers_say_what_they_say_in_the_whole_model(rooms: Path, kind: str) -> None:
    config = TeacherConfig.model_validate(TEACHERS[kind] | {"path": str(rooms / TEACHERS[kind]["path"])})
    encoder = load_text(config)
    if kind in ("cross_encoder", "llm_reranker"):
        batch = ModelBatch(3, pairs=encoder.pairs([q for q in QUERIES for _ in range(3)], PASSAGES))
    else:
        batch = ModelBatch(3, queries=encoder.queries(QUERIES), passages=encoder.passages(PASSAGES))
    whole, cut = (load_teacher(config, torch.float32, depth) for depth in (None, 2))
    assert cut.num_layers == 2 < whole.num_layers
    with torch.no_grad():
        for a, b in zip(*(tensors(model(batch, layers=[0, 1]).layers) for model in (whole, cut)), strict=True):
            assert torch.equal(a, b)


def test_only_given_layers_and_no_final_relevance_let_go_of_layers() -> None:
    given = {"select": "given", "teacher_layers": [1, 4], "student_layers": [0, 1]}

    def needed(**losses: Any) -> int:
        return losses_section().model_validate({"response": {"weight": 0.0}, **losses}).deepest(12)

    assert needed(layer=given) == 5
    assert needed(layer=given, response={"weight": 0.1}) == 12
    assert needed(layer=given, margin_mse={"weight": 0.1}) == 12
    assert needed(layer={"select": "random"}) == 12
    assert needed(layer=given, attention={"weight": 1.0, "select": "last"}) == 12
    higher = {"weight": 1.0, "select": "given", "teacher_layers": [7], "student_layers": [0]}
    assert needed(layer=given, attention=higher) == 8
    assert needed(layer=given | {"teacher_layers": [1, 40]}) == 12  # told when the run checks its layers
