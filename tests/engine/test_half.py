"""A student in float16: what a V100 or T4 trains, forced on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lead_ds.config import StudentConfig
from lead_ds.engine.records.universal import settle_steps
from lead_ds.engine.training.trainee import student_dtype
from tests.helpers.launch import launch


def test_auto_is_fp16_where_bf16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StudentConfig.of("dual_encoder")(path="x")
    for really, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        # As torch answers for a V100: supported, by emulation.
        answer = lambda including_emulation=True, really=really: including_emulation or really  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert student_dtype(settings, torch.device("cuda")) == dtype
    assert student_dtype(settings, torch.device("cpu")) == torch.float32


def test_float16_learns_as_float32_does_and_stage_0_is_refused(configure: Callable[..., Path]) -> None:
    """The loss scale begins at 65536, and steps whose gradients overflow are skipped: so it is set to what does not."""

    def config(name: str, dtype: str, stage: int, lr: float = 5e-3) -> str:
        zero = {"zero_optimization": {"stage": stage}} | ({"fp16": {"loss_scale": 128}} if dtype == "fp16" else {})
        train = {"steps": 10, "save_every": 10, "lr": lr}
        return str(configure(name, student={"dtype": dtype}, train=train, deepspeed={"student": zero}))

    halves = [config(f"fp16-zero{stage}", "fp16", stage) for stage in (1, 2, 3, 0)]
    cases = [config("still", "fp32", 1, lr=1e-9), config("fp32", "fp32", 1), *halves]
    still, exact, *found, refused = launch("tests.engine.half_jobs:run_each_forced", 1, configs=cases)[0]
    learned = still[-1] - exact[-1]
    assert learned > 0.1
    for stage, losses in zip((1, 2, 3), found, strict=True):
        assert abs(losses[-1] - exact[-1]) < 0.1 * learned, f"ZeRO-{stage}"
        np.testing.assert_allclose(losses, exact, rtol=1e-2, err_msg=f"ZeRO-{stage}")
    assert refused[0] == 2
    assert "fp16 with ZeRO stage 0" in refused[1]
    assert "student_zero1.json" in refused[1]


def test_why_stage_0_is_refused() -> None:
    """DeepSpeed's step divides by a scale that its backward has not multiplied by: where this fails, take it back."""
    assert launch("tests.engine.half_jobs:weights_after", 1, stages=[1, 0], scale=1024)[0] == [0.5, 1 - 0.5 / 1024]


def test_a_fused_optimizer_finds_its_step_counters_beside_its_parameters() -> None:
    """After loading a universal checkpoint: on a GPU torch raises at the first step otherwise."""
    parameters = [torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    shared = torch.tensor(7.0)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": shared}
    settle_steps(optimizer)
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [float(step) for step in steps] == [7.0, 7.0]
    assert steps[0] is not steps[1]
    optimizer.param_groups[0]["fused"] = True
    settle_steps(optimizer)
    assert {optimizer.state[p]["step"].device.type for p in parameters} == {"meta"}
    assert {optimizer.state[p]["step"].dtype for p in parameters} == {torch.float32}
