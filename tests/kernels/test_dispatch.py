"""Which implementation runs, what a device refuses, and where a kernel is started."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.kernels import dispatch, maxsim
from lead_ds.kernels.dispatch import AMPERE, HOPPER, probe, tiles_for, with_fallback

ROOT = Path(__file__).parents[2]


def fresh(code: str, **environment: str) -> str:
    """What a new process prints."""
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=given, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("pass", "ieee"),
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.set_float32_matmul_precision('highest')", "ieee"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    ],
)
def test_either_interface_of_torch_sets_the_precision(setting: str, expected: str) -> None:
    code = (
        "import torch; from lead_ds.kernels.dispatch import float32_dot_precision; {}; print(float32_dot_precision())"
    )
    assert fresh(code.format(setting)) == expected


def test_the_probe_runs_a_kernel(triton_device: torch.device) -> None:
    found = probe(triton_device.type, triton_device.index)
    assert found.obstacle is None
    assert found.seconds > 0


def test_what_keeps_triton_from_running_is_one_line() -> None:
    """A process that may not interpret, on a device that Triton cannot launch on."""
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    code = "from lead_ds.kernels.dispatch import probe; print(probe('cpu').obstacle)"
    line = fresh(code)
    assert line.startswith("Triton cannot compile and launch a kernel here: ")
    assert "\n" not in line


def test_a_refused_kernel_falls_back_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lead_ds.kernels.launch import KernelRefused

    monkeypatch.setattr(dispatch, "_REFUSED", {})
    tried = []

    def run(impl: str) -> str:
        tried.append(impl)
        if impl == "triton":
            raise KernelRefused("forward_kernel on cuda:0: out of resource: shared memory; set kernels: torch")
        return "done"

    with pytest.warns(UserWarning, match=r"maxsim runs on torch: .*shared memory"):
        assert with_fallback(run, "auto", "triton", kernel="maxsim") == "done"
    assert tried == ["triton", "torch"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match=r"cannot run here: forward_kernel .*shared memory"):
        maxsim(x, x, impl="triton")
    with pytest.raises(KernelRefused):
        with_fallback(run, "triton", "triton", kernel="layer_kl")


def test_out_of_resources_becomes_one_line_with_a_remedy() -> None:
    triton = pytest.importorskip("triton")
    from lead_ds.kernels.launch import KernelRefused, launch

    class Greedy:
        """What a compiled kernel does that asks for too much."""

        __name__ = "greedy_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def start(*_: Any, **__: Any) -> None:
                raise triton.OutOfResources(300_000, 232_448, "shared memory")

            return start

    with pytest.raises(KernelRefused, match=r"greedy_kernel on cpu: .*300000.*set kernels: torch"):
        launch(Greedy(), (1,), torch.zeros(1))
    with pytest.raises(ValueError, match="tensors on cpu, meta"):
        launch(Greedy(), (1,), torch.zeros(1), torch.zeros(1, device="meta"))


def test_tiles_are_chosen_by_what_a_block_may_have() -> None:
    table = {AMPERE: "middle", HOPPER: "large"}
    assert tiles_for(table, HOPPER) == "large"
    assert tiles_for(table, HOPPER - 1) == "middle"
    assert tiles_for(table, 1000) == "middle"
