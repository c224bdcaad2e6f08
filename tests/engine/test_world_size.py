"""A run continues on another number of processes, at every ZeRO stage, as if nothing had changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.engine.running import copy_run
from tests.helpers.launch import launch

JOB = "tests.engine.fault_jobs:run_each"
STAGES = range(4)
HALF = 4


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # In bf16 the order of a sum over ranks shows in the third digit, resumed or not.
    [("fp32", 1e-5), pytest.param("bf16", 1e-2, marks=pytest.mark.slow)],
)
def test_resumes_on_another_number_of_processes(
    configure: Callable[..., Path], tmp_path: Path, dtype: str, tolerance: float
) -> None:
    def runs(world: int) -> list[Path]:
        return [
            configure(
                f"{world}-zero{stage}",
                student={"dtype": dtype},
                train={"steps": 8, "save_every": HALF, "batch_size": 4 // world},
                deepspeed={"student": f"ds_configs/student_zero{stage}.json"},
            )
            for stage in STAGES
        ]

    of_two, of_one = runs(2), runs(1)
    both = launch(JOB, 2, configs=[str(path) for path in of_two])[0]
    shrunk = [copy_run(path, f"shrunk{stage}", step=HALF, train={"batch_size": 4}) for stage, path in enumerate(of_two)]
    refused = copy_run(of_two[1], "refused", step=HALF)
    [one] = launch(JOB, 1, configs=[str(p) for p in of_one], resume=[str(p) for p in [*shrunk, refused]])
    whole, after, error = one[:4], one[4:8], one[8]
    grown = [copy_run(path, f"grown{stage}", step=HALF, train={"batch_size": 2}) for stage, path in enumerate(of_one)]
    more = launch(JOB, 2, configs=[], resume=[str(path) for path in grown])[0]
    for stage in STAGES:
        np.testing.assert_allclose(after[stage], both[stage], rtol=tolerance, err_msg=f"ZeRO-{stage}, 2 to 1")
        np.testing.assert_allclose(more[stage], whole[stage], rtol=tolerance, err_msg=f"ZeRO-{stage}, 1 to 2")
        assert after[stage][:HALF] == both[stage][:HALF]
    assert error[0] == 2
    assert "a step would take 2 groups instead of 4" in error[1]
    assert not list(tmp_path.glob("*/checkpoints/*.partial")), "the converted checkpoint is removed"
    assert not list(tmp_path.glob("*/checkpoints/latest_universal"))
