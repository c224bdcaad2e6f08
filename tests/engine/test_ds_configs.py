"""Every JSON of ds_configs/ runs: the students and teachers of all placements, with the losses of the plainest ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.launch import ROOT, launch

JOB = "tests.engine.fault_jobs:run_each"
FILES = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
NVME = "teacher_zero3_nvme.json"  # compiles an operator for a minute
Configure = Callable[..., Path]


def config(configure: Configure, file: str, **teacher: Any) -> str:
    model = file.split("_")[0]
    path = configure(
        file.removesuffix(".json"),
        extra_teacher={"placement": "zero3", **teacher},
        train={"steps": 4, "batch_size": 2, "save_every": 2},
        deepspeed={model: f"ds_configs/{file}"},
    )
    return str(path)


def test_every_configuration_runs_and_gives_the_same_losses(configure: Configure) -> None:
    files = [file for file in FILES if file != NVME]
    assert len(files) == 7
    losses = launch(JOB, 2, configs=[config(configure, file) for file in files])[0]
    for file, found in zip(files, losses, strict=True):
        assert len(found) == 4, found
        np.testing.assert_allclose(found, losses[0], rtol=1e-5, err_msg=file)


@pytest.mark.slow
def test_a_teacher_on_nvme(configure: Configure, tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io operator cannot be built here (it needs libaio-dev)")
    plain = config(configure, "teacher_zero3.json")
    disk = config(configure, NVME, offload_path=str(tmp_path / "disk"))
    reference, found = launch(JOB, 2, timeout=1000, configs=[plain, disk])[0]
    assert len(found) == 4, found
    np.testing.assert_allclose(found, reference, rtol=1e-5)
    # DeepSpeed removes its files at the end; each rank's folder stays.
    assert {path.name for path in (tmp_path / "disk").rglob("rank*")} == {"rank0", "rank1"}
