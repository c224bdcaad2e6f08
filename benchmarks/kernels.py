"""Time and memory of the fused kernels beside eager torch, torch.compile and installed peers, in one run.

    python -m benchmarks.kernels --out FILE.json [--kernel maxsim ...] [--quick]

Every provider is first checked against the float64 reference. On CUDA: bfloat16, Triton's `do_bench` (median, 20% and 80%
quantiles), peak allocation above the inputs, and a CUDA graph for problems that launches decide. On a CPU: float32,
rounds in which the providers take turns (medians of time). Memory is the peak resident memory above the inputs of one
call in a process of its own. Writes one JSON object a line, and one plot a kernel beside the file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_spec import Ceilings, Inputs, KernelSpec, Shape

SPEC_MODULES = ("benchmarks.kernel_maxsim", "benchmarks.kernel_layer_kl", "benchmarks.kernel_attention")
MODES = ("forward", "forward+backward")
# An H200's measured bfloat16 product and copy, and its exponentials by datasheet (16 a clock and multiprocessor).
H200 = Ceilings(flops=790e12, bandwidth=4.3e12, exp2=4.2e12)
_CPU_SECONDS, _CPU_ROUNDS = 8.0, (3, 30)
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_MIB = 2**20
Row = dict[str, Any]


def specs(names: list[str] | None) -> list[KernelSpec]:
    """The requested benchmarks, or all."""
    found = [spec for module in SPEC_MODULES if find_spec(module) for spec in import_module(module).SPECS]
    unknown = set(names or ()) - {spec.name for spec in found}
    if unknown:
        raise SystemExit(f"error: no benchmark of {', '.join(unknown)} (one of {', '.join(s.name for s in found)})")
    return [spec for spec in found if not names or spec.name in names]


def call(provider: Callable[..., Tensor], inputs: Inputs, mode: str) -> Callable[[], Any]:
    """One call of a provider in a mode, as a function without arguments."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return provider(**inputs.tensors)

        return forward

    def both() -> tuple[Tensor, ...]:
        output = provider(**inputs.tensors)
        leaves = [inputs.tensors[name] for name in inputs.differentiable]
        return torch.autograd.grad(output, leaves, inputs.weight.to(output.dtype))

    return both


def providers_of(spec: KernelSpec) -> dict[str, Callable[..., Tensor]]:
    """The spec's providers, and the eager one compiled."""
    compiled = torch.compile(spec.providers["eager"], dynamic=False)
    first, *rest = spec.providers.items()
    return dict([first, ("torch.compile", compiled), *rest])


def check(spec: KernelSpec, provider: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a provider cannot take part: not installed, or wrong against the float64 reference; else None."""
    torch.manual_seed(0)
    inputs = spec.make_inputs(spec.check_shape, dtype, device)
    exact_tensors = {
        name: value.detach().double().requires_grad_(name in inputs.differentiable)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.tensors.items()
    }
    exact_inputs = Inputs(exact_tensors, inputs.differentiable, inputs.weight)
    try:
        found = [call(provider, inputs, "forward")(), *call(provider, inputs, MODES[1])()]
    except ImportError as error:
        return f"absent ({error})"
    except Exception as error:
        return f"failed ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    exact = [call(spec.reference, exact_inputs, "forward")(), *call(spec.reference, exact_inputs, MODES[1])()]
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for got, true in zip(found, exact, strict=True):
        distance = (got.double() - true).abs().max() / true.abs().max().clamp(min=1e-12)
        if not distance < tolerance:
            return f"wrong (relative error {distance:.2g} against an allowed {tolerance:.0e})"
    return None


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20% and 80% quantiles."""
    ordered = torch.tensor(values, dtype=torch.float64)
    middle, low, high = torch.quantile(ordered, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return middle, low, high


def time_on_cpu(
    calls: dict[str, Callable[[], Any]], clock: Callable[[], float]
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of each call. They take turns, each round starting with another, so that drift hits all alike."""
    for function in calls.values():
        function()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < _CPU_ROUNDS[0] or (rounds < _CPU_ROUNDS[1] and time.perf_counter() - start < _CPU_SECONDS):
        for step in range(len(names)):
            name = names[(step + rounds) % len(names)]
            before = clock()
            calls[name]()
            times[name].append(1e3 * (clock() - before))
        rounds += 1
    return {name: quantiles(values) for name, values in times.items()}


def cpu_peak(spec: KernelSpec, name: str, mode: str, shape: Shape) -> float:
    """MiB that one call adds to the resident memory of a fresh process, gradients included.

    Free lists would hide memory that inputs left behind: the process returns every block over 64 KiB to the system.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    request = json.dumps([spec.name, name, mode, shape])
    command = [sys.executable, "-m", "benchmarks.kernels", "--measure-memory", request]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_memory(request: str) -> None:
    """The other side of `cpu_peak`: print the peak of one call in MiB."""
    kernel, name, mode, shape = json.loads(request)
    (spec,) = specs([kernel])
    provider = providers_of(spec)[name]
    # What the first call of anything loads (and compiles) is not the kernel's.
    call(provider, spec.make_inputs(spec.check_shape, torch.float32, torch.device("cpu")), mode)()
    function = call(provider, spec.make_inputs(shape, torch.float32, torch.device("cpu")), mode)
    if name == "torch.compile":
        function()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = function()
    print((_resident("VmHWM") - before) / 1024)
    del result


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure_on_cuda(
    calls: dict[str, Callable[[], Any]], graph: bool
) -> Iterator[tuple[str, str, str, tuple[float, float, float]]]:
    """(provider, metric, unit, quantiles) of each call; what does not fit in memory is left out with a note."""
    from triton.testing import do_bench, do_bench_cudagraph

    wanted = [0.5, 0.2, 0.8]
    for name, function in calls.items():
        try:
            function()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = function()
            peak = (torch.cuda.max_memory_allocated() - before) / _MIB
            del result
            yield name, "peak memory", "MiB", (peak, peak, peak)
            yield name, "time", "ms", tuple(do_bench(function, warmup=25, rep=150, quantiles=wanted))
            if graph:
                yield name, "time in a CUDA graph", "ms", tuple(do_bench_cudagraph(function, quantiles=wanted))
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory", flush=True)
        except RuntimeError as error:
            print(f"  {name}: {str(error).splitlines()[0]}", flush=True)
        torch.cuda.empty_cache()


def cpu_ceilings(clock: Callable[[], float]) -> Ceilings:
    """What this CPU reaches on float32: a large product, a copy past the caches, exponentials in them."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    big, small = torch.empty(1 << 26), torch.randn(1 << 18)
    other = torch.empty_like(big)
    product = min(_seconds(lambda: a @ b, clock) for _ in range(5))
    copy = min(_seconds(lambda: other.copy_(big), clock) for _ in range(3))
    exponent = min(_seconds(lambda: torch.exp2(small), clock) for _ in range(20))
    return Ceilings(2 * 2048**3 / product, 2 * big.nbytes / copy, small.numel() / exponent)


def _seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    before = clock()
    function()
    return clock() - before


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "flash-maxsim", "late-interaction-kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """The GPU's name, or the CPU's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def run(spec: KernelSpec, device: torch.device, ceilings: Ceilings, quick: bool, clock: str) -> Iterator[Row]:
    """Every row of one kernel."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    common: Row = {"kernel": spec.name, "dtype": str(dtype).removeprefix("torch.")}
    common |= {"gpu" if device.type == "cuda" else "machine": machine(device), "versions": versions()}
    if device.type == "cpu":
        common["clock"] = clock
    common["date"] = date.today().isoformat()
    providers = providers_of(spec)
    for name in list(providers):
        problem = check(spec, providers[name], dtype, device)
        if problem is not None:
            print(f"{spec.name}: {name} {problem}", flush=True)
            del providers[name]
    shapes = spec.shapes[device.type]
    for place, shape in enumerate(shapes[:1] if quick else shapes):
        torch.manual_seed(0)
        # After eight shapes and modes torch.compile would silently run the eager code.
        torch._dynamo.reset()
        inputs = spec.make_inputs(shape, dtype, device)
        for mode in MODES:
            floor = 1e3 * spec.floor(shape, mode, dtype.itemsize, ceilings)
            calls = {name: call(provider, inputs, mode) for name, provider in providers.items()}
            if device.type == "cuda":
                measured = measure_on_cuda(calls, place in spec.graph)
            else:
                times = time_on_cpu(calls, CLOCKS[clock])
                peaks = {name: (cpu_peak(spec, name, mode, shape),) * 3 for name in calls}
                measured = iter(
                    [(name, "time", "ms", times[name]) for name in calls]
                    + [(name, "peak memory", "MiB", peaks[name]) for name in calls]
                )
            for name, metric, unit, (value, low, high) in measured:
                row: Row = common | {"provider": name, "mode": mode, "metric": metric, "unit": unit, "shape": shape}
                row |= {"value": value, "p20": low, "p80": high}
                yield row | ({"floor": floor, "roofline": floor / value} if unit == "ms" else {})


def table(rows: list[Row]) -> str:
    """The rows as text: one line a shape, mode and provider."""
    lines: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        shape = " ".join(f"{key}{value}" if value is not True else key for key, value in row["shape"].items())
        lines.setdefault((row["kernel"], shape, row["mode"], row["provider"]), {})[row["metric"]] = row
    head = "| kernel | shape | mode | provider | time, ms (20% - 80%) | of the floor | in a graph, ms | peak, MiB |"
    text = [head, "|" + "---|" * 8]
    for names, cells in lines.items():
        duration, graph, peak = (cells.get(key) for key in ("time", "time in a CUDA graph", "peak memory"))
        text.append(
            "| "
            + " | ".join(names)
            + (f" | {duration['value']:.4g} ({duration['p20']:.4g} - {duration['p80']:.4g})" if duration else " | ")
            + (f" | {100 * duration['roofline']:.0f}%" if duration else " | ")
            + (f" | {graph['value']:.3g}" if graph else " | ")
            + (f" | {peak['value']:.4g} |" if peak else " | |")
        )
    return "\n".join(text)


def found(rows: list[Row]) -> str:
    """In one line: ours beside the best of the others, at the largest shape that was run."""
    timed = [row for row in rows if row["metric"] == "time" and row["mode"] == MODES[1]]
    largest = [row for row in timed if row["shape"] == timed[-1]["shape"]]
    ours = next((row for row in largest if row["provider"] == "lead-ds"), None)
    others = [row for row in largest if not row["provider"].startswith("lead-ds")]
    if ours is None or not others:
        return "nothing was timed: see the log"
    best = min(others, key=lambda row: row["value"])
    shape = " ".join(f"{key}{value}" for key, value in ours["shape"].items())
    return (
        f"{ours['kernel']} {shape}, {MODES[1]}: {ours['value']:.3g} ms, {ours['roofline']:.0%} of the floor; "
        f"{best['provider']} {best['value']:.3g} ms"
    )


def plot(spec: KernelSpec, rows: list[Row], path: Path) -> None:
    """Time and peak memory of forward + backward over problem size, one line a provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, metric in zip(axes, ("time", "peak memory"), strict=True):
        chosen = [
            row
            for row in rows
            if row["metric"] == metric and row["mode"] == MODES[1] and not row["shape"].get("ragged")
        ]
        for name in dict.fromkeys(row["provider"] for row in chosen):
            points = sorted((spec.size(row["shape"]), row["value"]) for row in chosen if row["provider"] == name)
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        if metric == "time" and chosen:
            floors = sorted({(spec.size(row["shape"]), row["floor"]) for row in chosen})
            axis.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor")
        axis.set(xscale="log", yscale="log", xlabel=spec.size_label, ylabel="ms" if metric == "time" else "MiB")
        axis.set_title(f"{spec.name}, forward + backward: {metric}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the rows, one JSON object a line; plots go beside it")
    parser.add_argument("--kernel", nargs="+", help="only these")
    parser.add_argument("--quick", action="store_true", help="only each kernel's first shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; 1 where other work shares the cores")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="on a CPU: wall time, or processor time, which other work on the machine disturbs less",
    )
    parser.add_argument("--flops", type=float, help="ceiling of matrix products, FLOP/s")
    parser.add_argument("--bandwidth", type=float, help="ceiling of memory traffic, bytes/s")
    parser.add_argument("--exp2", type=float, help="ceiling of base-2 exponentials, 1/s")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure_memory:
        measure_memory(given.measure_memory)
        return
    if given.out is None:
        parser.error("--out is needed")
    if given.threads:
        torch.set_num_threads(given.threads)
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    device = torch.device(given.device)
    base = H200 if device.type == "cuda" else cpu_ceilings(CLOCKS[given.clock])
    ceilings = Ceilings(given.flops or base.flops, given.bandwidth or base.bandwidth, given.exp2 or base.exp2)
    print(
        f"{machine(device)}; ceilings {ceilings.flops:.3g} FLOP/s, {ceilings.bandwidth:.3g} B/s, {ceilings.exp2:.3g} exp2/s"
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("")
    rows: list[Row] = []
    for spec in specs(given.kernel):
        of_spec = []
        for row in run(spec, device, ceilings, given.quick, given.clock):
            of_spec.append(row)
            with given.out.open("a", encoding="utf-8") as file:  # at once: the run may be cut off
                file.write(json.dumps(row) + "\n")
            print(f"{row['kernel']} {row['shape']} {row['mode']} {row['provider']} {row['metric']}: {row['value']:.4g}")
        rows += of_spec
        if of_spec:
            plot(spec, of_spec, given.out.with_name(f"{given.out.stem}-{spec.name}.png"))
    print(table(rows))
    for spec in specs(given.kernel):
        print(f"found: {found([row for row in rows if row['kernel'] == spec.name])}")


if __name__ == "__main__":
    main()
