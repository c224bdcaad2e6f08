"""Every shipped Triton configuration compiles, without a GPU, within the limits of the chips it is meant for."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from lead_ds.kernels.aot import CHIPS, KERNEL_MODULES

# What the names of a module's variants begin with: its folder, or its own where a folder has two.
FAMILIES = [
    folder if name == "triton_kernel" else name.removesuffix("_kernel")
    for folder, name in (module.split(".")[-2:] for module in KERNEL_MODULES)
]
# Registers a thread, and of a multiprocessor, where spilling is not what the compiler does first.
REGISTERS, ALL_REGISTERS = 255, 65536

# Bytes that spill where no tile of those tried is better. Hopper's that spill at neither width of dK leave out its matrix
# instructions; one stage spills at 128x128 instead. Halving Blackwell's tiles of scores halves what each value is used for.
# Tiles were chosen with Triton 3.9; what earlier ones spill is in benchmarks/README.md.
CHOSEN_FOR = tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
SPILLS = {
    ("sm_90", "attention_kl-dk-bf16-d128x80-L512-K1-masked"): 32,
    ("sm_100", "layer-kl-scores-large-bf16-p500-d768-masked-stored"): 16,
}


def _compiled(*arguments: str) -> list[dict[str, Any]]:
    """What the compiler made of each variant, in a process of its own: in this one Triton may be set to interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lead_ds.kernels.aot", *arguments]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=1500)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows, f"no variant for {arguments}"
    return rows


def problems(row: dict[str, Any]) -> list[str]:
    """What a chip would refuse, or be slow at."""
    nvidia = CHIPS[row["chip"]].backend == "cuda"
    reduces = row["name"].startswith("maxsim-forward")
    found = (
        # Elsewhere what spills is slow, not refused; benchmarks/README.md lists it.
        (
            f"{row['stack']} bytes of registers spilled to memory",
            CHOSEN_FOR
            and row["chip"] in ("sm_90", "sm_100")
            and row["stack"] > SPILLS.get((row["chip"], row["name"]), 0),
        ),
        (f"{row['registers']} registers a thread", nvidia and row["registers"] > REGISTERS),
        (
            f"{row['registers']} registers x {row['num_warps']} warps do not fit a multiprocessor",
            nvidia and row["registers"] * row["num_warps"] * 32 > ALL_REGISTERS,
        ),
        (f"{row['shared']} bytes of shared memory", row["shared"] > CHIPS[row["chip"]].shared),
        ("no wgmma", row["expects_wgmma"] and row["wgmma"] == 0),
        ("a maximum that drops NaN", nvidia and reduces and row["keeps_nan"] == 0),
    )
    return [f"{row['chip']} {row['name']}: {what}" for what, wrong in found if wrong]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_integers_that_are_one_compile(family: str) -> None:
    """Triton turns an argument of value 1 into a constant, on which a tensor's methods do not exist."""
    _compiled(family, "--ones", "--hardest")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "chip", [pytest.param(chip, marks=() if chip == "sm_90" else pytest.mark.slow) for chip in CHIPS]
)
def test_the_hardest_variants_fit_the_chip(family: str, chip: str) -> None:
    """Of each kernel, tile and number of layer pairs the variant that has most to do: half of those that there are."""
    rows = _compiled(family, "--hardest", "--chip", chip)
    assert len({row["name"] for row in rows}) == len(rows)
    assert not (wrong := [line for row in rows for line in problems(row)]), "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_fits_hopper(family: str) -> None:
    wrong = [line for row in _compiled(family) for line in problems(row)]
    assert not wrong, "\n".join(wrong)
