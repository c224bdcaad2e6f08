"""Compiled layers stay compiled, whatever shapes and modes a run has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lead_ds.config import StudentConfig
from lead_ds.models.load import load_student
from tests.models.tiny_models import tiny_model, tokens_of


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_varying_shapes_and_modes_cost_few_graphs(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path, family, layers=6)
    student = load_student(StudentConfig.of("dual_encoder")(path=path, pooling="mean"), torch.float32).eval()
    shapes = [(3, 9, 5), (7, 30, 12, 4), (11,), (8, 8), (40, 1), (6, 6, 6, 6, 6), (33, 20, 21), (5,), (17, 17)]
    with torch.no_grad():
        plain = [student(tokens=tokens_of(lengths), layers=[1]) for lengths in shapes]
    torch._dynamo.reset()
    counters.clear()
    # Past the limit torch would run the layers uncompiled, without an error.
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        student.compile_layers(backend="eager")
        for lengths, expected in zip(shapes, plain, strict=True):
            with torch.no_grad():
                said = student(tokens=tokens_of(lengths), layers=[1])
            torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
            student.train()(tokens=tokens_of(lengths), layers=[1]).sum().backward()
            student.eval()
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert 1 < graphs <= 16, "for 6 layers, 9 shapes and 2 modes"
