"""Which implementation runs, what a device refuses, and where a kernel is started."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lead_ds.kernels import builds, dispatch, maxsim
from lead_ds.kernels.dispatch import AMPERE, BLACKWELL, HOPPER, probe, tiles_for, with_fallback

ROOT = Path(__file__).parents[2]


def fresh(code: str, **environment: str) -> str:
    """What a new process prints."""
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=given, cwd=ROOT, timeout=900
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
        if impl != "torch":
            raise KernelRefused("forward_kernel on cuda:0: out of resource: shared memory; set kernels: torch")
        return "done"

    with pytest.warns(UserWarning, match=r"maxsim runs on torch: .*shared memory"):
        assert with_fallback(run, "auto", "triton", kernel="maxsim") == "done"
    assert tried == ["auto", "torch"]
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


def test_tiles_are_chosen_by_what_a_block_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for major, key in ((9, HOPPER), (10, BLACKWELL)):
        found = SimpleNamespace(major=major, shared_memory_per_block_optin=HOPPER)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        assert dispatch._shared_memory.__wrapped__(0) == key
    table = {AMPERE: "middle", HOPPER: "large"}
    assert tiles_for(table, HOPPER) == tiles_for(table, BLACKWELL) == "large"
    assert tiles_for(table, HOPPER - 1) == "middle"
    assert tiles_for(table, 1000) == "middle"


def test_a_refusal_in_the_backward_pass_is_made_good_by_torch(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass ran as a kernel. The gradient is then torch's, and so is every later call; not so if asked by name."""
    from lead_ds.kernels import Factors, attention_kl, factors_kl, launch

    x = {
        name: torch.randn(2, 4, 5, 16, device=triton_device, requires_grad=name[0] == "s")
        for name in ("t", "t2", "s", "s2")
    }
    mask = torch.ones(2, 5, dtype=torch.bool, device=triton_device)
    mask[1, 3:] = False
    target = torch.zeros(4, dtype=torch.long, device=triton_device)

    def of_vectors(impl: str) -> torch.Tensor:
        teacher, student = (
            Factors(x[a][:, :, 0], x[b][:, :, 1], 0.5, cosine=True) for a, b in (("t", "t2"), ("s", "s2"))
        )
        return (
            factors_kl(teacher, student, target, impl=impl)[0] * torch.tensor([1.0, 2.0], device=triton_device)
        ).sum()

    def of_scaled_rows(impl: str) -> torch.Tensor:
        q, d = x["s"][:, :, 0], x["s2"][:, :, 1]
        student = Factors(q, d, row_scale=q.square().sum(-1).exp())
        return factors_kl(Factors(x["t"][:, :, 0], x["t2"][:, :, 1]), student, target, impl=impl)[0].sum()

    calls: dict[str, Any] = {
        "layer_kl": lambda impl: of_vectors(impl) + of_scaled_rows(impl),
        "maxsim": lambda impl: maxsim(x["s"][0], x["s2"][1], cosine=True, impl=impl).square().sum(),
        "attention_kl": lambda impl: attention_kl(
            [x["t"]] * 2, [x["t2"]] * 2, [x["s"]] * 2, [x["s2"]] * 2, mask, impl=impl
        ),
        "attention_kl of averaged heads": lambda impl: attention_kl(
            x["t"], x["t2"], x["s"], x["s2"], mask, impl=impl, head_mean=True
        ),
    }
    monkeypatch.setattr(dispatch, "_REFUSED", {})
    # So that "auto" takes the interpreter, where there is no GPU.
    real, started = dispatch.resolve, list[str]()

    def chosen(impl: str, *tensors: torch.Tensor, kernel: str) -> str:
        return real("triton" if impl == "auto" else impl, *tensors, kernel=kernel)

    def observe(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        started.append(kernel.__name__)
        if "gradient" in kernel.__name__ or "residual" in kernel.__name__:
            raise launch.KernelRefused(f"{kernel.__name__}: out of resource: shared memory; set kernels: torch")

    monkeypatch.setattr(launch, "observers", [observe])
    for name, call in calls.items():
        monkeypatch.setattr(sys.modules[f"lead_ds.kernels.{name.split()[0]}.op"], "resolve", chosen)
        inputs = [x["s"], x["s2"]]
        exact = torch.autograd.grad(call("torch"), inputs)
        with pytest.raises(launch.KernelRefused):
            torch.autograd.grad(call("triton"), inputs)
        started.clear()
        with pytest.warns(UserWarning, match=rf"{name} runs on torch: .*shared memory"):
            found = torch.autograd.grad(call("auto"), inputs)
        assert len(started) > 1, "the forward pass was the kernel's"
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert name in dispatch._REFUSED


def test_what_was_built_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lead_ds.kernels.launch import launch

    class Slow:
        """A kernel that is built when it is first launched."""

        __name__ = "slow_kernel"
        built = False

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def start(*_: Any, **__: Any) -> None:
                time.sleep(0 if self.built else 2 * builds.BUILD_SECONDS)
                self.built = True

            return start

    monkeypatch.setattr(builds, "_BUILT", [])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    kernel = Slow()
    launch(kernel, (1,), torch.zeros(1))
    launch(kernel, (1,), torch.zeros(1))
    assert re.fullmatch(r"built 1 kernel\(s\): slow_kernel \d\.\d s", builds.take_builds() or "")
    assert builds.take_builds() is None
