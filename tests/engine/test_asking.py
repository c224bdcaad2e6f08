"""A student that reads queries alone: every loss compares them with the teacher's vectors of the passages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.losses.views import Side
from lead_ds.relevance import VectorFeatures
from tests.engine.jobs import distil_each
from tests.helpers.launch import launch

JOB = "tests.engine.jobs:distil_each"
LOSSES: dict[str, Any] = {
    "layer": {"weight": 0},
    "response": {"weight": 1, "teacher_temperature": 0.5, "student_temperature": 0.05},
    "contrastive": {"weight": 1, "temperature": 0.1},
    "embedding": {"weight": 1, "into": "same", "of": ["queries"]},
}
ITSELF = {"path": "llama", "normalize": True}  # the teacher as its own student
TRAIN: dict[str, Any] = {"steps": 3, "batch_size": 4, "lr": 1e-9, "save_every": 3}


def test_the_teachers_passages_stand_for_the_students(configure: Callable[..., Path]) -> None:
    """Where both models are one, it makes no difference who reads the passages, however they are read."""
    teacher = {"extra_teacher": {"normalize": True}, "losses": LOSSES}
    asking = {**ITSELF, "passages": "teacher"}
    runs = [
        configure("own", student=ITSELF, train=TRAIN, **teacher),
        configure("asking", student=asking, train=TRAIN, **teacher),
        configure("passes", student={**asking, "passes": 2}, train=TRAIN, **teacher),
        configure("cache", student=asking, train={**TRAIN, "grad_cache": 2}, **teacher),
    ]
    own, *others = distil_each([str(path) for path in runs])
    split = configure("split", student=asking, train={**TRAIN, "batch_size": 2}, **teacher)
    [[two], _] = launch(JOB, 2, configs=[str(split)])
    for found in (*others, two):
        np.testing.assert_allclose(found, own, rtol=1e-5)


def test_it_learns_to_ask(configure: Callable[..., Path]) -> None:
    section = {"path": "student", "normalize": True, "passages": "teacher", "projection": 32}
    train = {**TRAIN, "steps": 40, "lr": 5e-3, "save_every": 40}
    [losses] = distil_each([str(configure("learns", student=section, train=train, losses=LOSSES))])
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_widths_that_differ_are_refused(configure: Callable[..., Path]) -> None:
    section = {"path": "student", "normalize": True, "passages": "teacher"}
    losses = {**LOSSES, "embedding": {"weight": 0}}
    [refused] = distil_each([str(configure("narrow", student=section, train=TRAIN, losses=losses))])
    assert "student.passages: the teacher's passages have 32 dimensions" in refused
    assert "student.projection: 32" in refused


def test_a_teacher_of_token_vectors_is_refused(configure: Callable[..., Path]) -> None:
    section = {"path": "student", "normalize": True, "passages": "teacher"}
    losses = {**LOSSES, "embedding": {"weight": 0}}
    [refused] = distil_each([str(configure("colbert", teacher="colbert", student=section, train=TRAIN, losses=losses))])
    assert "student.passages: the teacher gives no vectors of its passages" in refused


def test_passages_are_as_an_index_by_cosine_holds_them() -> None:
    query, passage = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    own, theirs = (Side(VectorFeatures(query, passage, scale)) for scale in ("none", "cosine"))
    assert own.asking(theirs).final.p_KPD.tolist() == [[[pytest.approx(0.6), pytest.approx(0.8)]]]
    assert own.asking(own).final.p_KPD.tolist() == [[[3.0, 4.0]]]
