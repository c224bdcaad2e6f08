"""Every shipped Triton configuration compiles for Hopper, without a GPU, within the chip's limits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# A program's share of a Hopper multiprocessor: registers a thread, bytes of shared memory.
REGISTERS = 255
SHARED = 227 * 1024


def _families() -> list[str]:
    from lead_ds.kernels.aot import KERNEL_MODULES

    return [module.split(".")[2] for module in KERNEL_MODULES]


def _compiled(*arguments: str) -> list[dict[str, Any]]:
    """What the compiler made of each variant, in a process of its own: in this one Triton may be set to interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lead_ds.kernels.aot", *arguments]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows, f"no variant for {arguments}"
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("family", _families())
def test_integers_that_are_one_compile(family: str) -> None:
    """Triton turns an argument of value 1 into a constant, on which a tensor's methods do not exist."""
    _compiled(family, "--ones")


@pytest.mark.parametrize("family", _families())
def test_every_variant_fits_the_chip(family: str) -> None:
    rows = _compiled(family)
    assert len({row["name"] for row in rows}) == len(rows)
    problems = [
        row["name"] + ": " + problem
        for row in rows
        for problem, found in (
            (f"{row['stack']} bytes of registers spilled to memory", row["stack"] > 0),
            (f"{row['registers']} registers a thread", row["registers"] > REGISTERS),
            (
                f"{row['registers']} registers x {row['num_warps']} warps do not fit a multiprocessor",
                row["registers"] * row["num_warps"] * 32 > 65536,
            ),
            (f"{row['shared']} bytes of shared memory", row["shared"] > SHARED),
            ("no wgmma", row["expects_wgmma"] and row["wgmma"] == 0),
        )
        if found
    ]
    assert not problems, "\n".join(problems)
