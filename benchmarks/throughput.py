"""Training throughput through the real engine, beside the bare models and what a user would run instead, in one run.

    python -m benchmarks.throughput --preset tiny                                  # a CPU, under a minute
    deepspeed --module benchmarks.throughput --preset 7b --out 7b.json             # a GPU or several
    python -m benchmarks.throughput --preset bert train.batch_size=64 --compare kernels=torch --compare train.in_batch=local
    python -m benchmarks.throughput --config my.yaml                               # your models and data

Presets have shapes of real models, RANDOM weights and synthetic texts: they measure speed and memory, never quality.
Every setting of lead-ds can be given as key=value. Providers take turns, so that what else the machine does hits all
alike:

lead-ds          the engine's own training loop: data, teacher, gathers, student, losses, backward, optimizer, statistics
bare             the teacher's forward and the student's forward and backward on the same padded batches, and nothing else
LEAD's loop      the published loop, in float32 (one process)
plain loop       two Hugging Face models and eager losses (one process)
cached teacher   lead-ds, reading the relevance that `lead-ds teach` wrote: a query's own passages are compared
cached vectors   lead-ds, reading what `lead-ds teach --vectors auto` wrote: every passage of the batch is, as by the teacher
labels alone     lead-ds without a teacher

The overhead ratio is lead-ds's step over the bare one. The baselines' tokenisation is not counted, lead-ds's is. MFU is of the
models' own products on real tokens: 2 x parameters of the layers x tokens, attention in addition, three times that for
the student. Memory is what building and warming up left behind plus what a step adds at its peak. Writes one JSON
object a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import Row, machine
from benchmarks.throughput_memory import return_freed
from benchmarks.throughput_presets import PRESETS, Preset, configuration, write_data, write_model
from benchmarks.throughput_runners import ProcessorClock, Runner, build_runner, same_losses
from lead_ds.config import Config, load_config
from lead_ds.config.load import parse_config
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.records.phases import PhaseClock, mean_phases
from lead_ds.engine.records.profile import read_trace
from lead_ds.errors import InputError, LeadError
from lead_ds.io.provenance import versions
from lead_ds.settings.parse import apply_override

MIB = 2**20
TRACED = 2  # steps under the profiler, for the communication that nothing hides


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--preset", choices=list(PRESETS), help="; ".join(f"{k}: {v.about}" for k, v in PRESETS.items())
    )
    source.add_argument("--config", type=Path, help="a configuration of your own, with its models and data")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of lead-ds")
    parser.add_argument(
        "--compare", action="append", default=[], metavar="'KEY=VALUE ...'", help="another setting, measured in turn"
    )
    parser.add_argument("--providers", help="comma-separated; default: the preset's, or lead-ds,bare")
    parser.add_argument("--steps", type=int, help="measured steps of each provider")
    parser.add_argument("--warmup", type=int, help="steps before")
    parser.add_argument("--rounds", type=int, default=2, help="turns over which the steps are spread")
    parser.add_argument("--lengths", choices=["full", "natural"], help="of the synthetic texts")
    parser.add_argument(
        "--clock", choices=["wall", "processor"], default="wall", help="processor: for a CPU that others use as well"
    )
    parser.add_argument(
        "--flops", type=float, help="peak FLOP/s for MFU; default: a large product, measured in the fastest way"
    )
    parser.add_argument("--memory-steps", type=int, default=0, help="instead: memory over so many steps of lead-ds")
    parser.add_argument("--folder", type=Path, help="for models and data; shared by all machines; default: temporary")
    parser.add_argument("--out", type=Path, help="where to write the rows")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def settings_of(given: argparse.Namespace, folder: Path, overrides: Sequence[str]) -> Config:
    """The checked configuration of one setting. Raises InputError as `lead-ds distill` would."""
    if not given.preset:
        return load_config(given.config, [*overrides, f"output={folder / 'run'}", "evaluation.split=null"])
    warmup, steps = lengths_of(given)
    longest = max(1000, warmup + steps + 8, given.memory_steps)
    tree = configuration(PRESETS[given.preset], folder, steps=longest)
    for override in overrides:
        apply_override(tree, override, Config)
    return parse_config(tree, f"preset {given.preset}")


def lengths_of(given: argparse.Namespace) -> tuple[int, int]:
    """Steps of warm-up, and measured ones."""
    preset = PRESETS.get(given.preset)
    warmup = given.warmup if given.warmup is not None else preset.warmup if preset else 3
    return warmup, given.steps or (preset.steps if preset else 8)


def write_files(preset: Preset, config: Config, folder: Path, world: int, lengths: str) -> None:
    """The preset's models and texts for the setting's batch."""
    assert config.teacher is not None
    for name, shape in (("teacher", preset.teacher), ("student", preset.student)):
        if not (folder / name / "config.json").exists():
            write_model(folder / name, shape, config.teacher.kind if name == "teacher" else "dual_encoder")
    window = world * config.train.batch_size * config.train.accumulation
    models = (config.student, config.teacher)
    longest = max(getattr(model, name, 0) for model in models for name in ("passage_length", "max_length"))
    queries = max(getattr(model, "query_length", 0) for model in models)
    groups = max(8 * window, 64)
    if not (folder / "data" / "train.jsonl").exists() or _groups(folder / "data") < groups:
        write_data(folder / "data", groups, 1 + config.data.negatives, queries, longest, lengths)


def _groups(data: Path) -> int:
    return sum(1 for _ in (data / "train.jsonl").open())


def measure(
    config: Config, names: Sequence[str], ranks: Ranks, *, warmup: int, steps: int, rounds: int, flops: float | None
) -> Iterator[Row]:
    """The rows of one setting: build and warm up each provider, let them take turns, then look at memory and waiting."""
    runners: list[Runner] = []
    for name in names:
        try:
            runner = build_runner(name, config, ranks, runners)
            runner.warm_up(warmup)
            runners.append(runner)
        except torch.cuda.OutOfMemoryError:
            yield {"provider": name, "metric": "outcome", "unit": "", "value": "out of memory"}
            torch.cuda.empty_cache()
    times: dict[str, list[dict[str, float]]] = {runner.name: [] for runner in runners}
    done = warmup
    for turn in range(rounds):
        count = steps * (turn + 1) // rounds - steps * turn // rounds
        order = runners if turn % 2 == 0 else runners[::-1]
        for runner in order:
            times[runner.name] += runner.timed(done, count)
        done += count
    for runner in runners:
        yield from speed_rows(runner, times[runner.name], ranks, flops)
    bare = times.get("bare")
    for runner in runners:
        if bare and runner.name == "lead-ds":
            yield row_of(runner, "overhead ratio", "x", overhead(times[runner.name], bare))
        if runner.talks and ranks.world > 1:
            yield row_of(runner, "exposed communication", "ms", exposed_communication(runner, done, ranks))
            done += TRACED
        elif runner.talks:
            yield row_of(runner, "exposed communication", "ms", 0.0)
    for runner in runners:
        held, peaks = runner.held, runner.peaks(done)
        yield row_of(runner, "memory held between steps", "MiB", held / MIB)
        yield row_of(runner, "peak memory", "MiB", (held + max(peaks.values())) / MIB)
        yield from [row_of(runner, f"peak memory, {part}", "MiB", (held + x) / MIB) for part, x in peaks.items()]
        runner.close()


def overhead(ours: list[dict[str, float]], bare: list[dict[str, float]]) -> float:
    """The mean step over the mean of the bare one's teacher forward, student forward and backward."""
    needed = mean_phases(bare)
    floor = sum(needed[part] for part in ("teacher forward", "student forward", "backward"))
    return fmean([sum(step.values()) for step in ours]) / floor


def speed_rows(runner: Runner, steps: list[dict[str, float]], ranks: Ranks, flops: float | None) -> list[Row]:
    """Rates, quantiles of the step, parts and model FLOP utilisation."""
    whole = [sum(step.values()) for step in steps]
    mean, parts = fmean(whole), mean_phases(steps)
    work = runner.work
    rows = [
        row_of(runner, "queries per second", "1/s", ranks.world * work.queries / mean),
        row_of(runner, "passages per second", "1/s", ranks.world * work.passages / mean),
        row_of(runner, "student tokens per second", "1/s", ranks.world * work.student_tokens / mean),
        row_of(runner, "step p50", "ms", 1e3 * float(np.percentile(whole, 50))),
        row_of(runner, "step p95", "ms", 1e3 * float(np.percentile(whole, 95))),
    ]
    if "teacher forward" in parts and runner.reads_teacher:
        rows.append(row_of(runner, "teacher tokens per second", "1/s", ranks.world * work.teacher_tokens / mean))
        peak = flops or peak_flops(ranks.device, runner.teacher_dtype)
        rate = work.teacher_flops / parts["teacher forward"]
        rows.append(row_of(runner, "teacher MFU", "", mfu(rate, peak), flops=rate, peak_flops=peak))
    if "backward" in parts:
        peak = flops or peak_flops(ranks.device, runner.student_dtype)
        rate = work.student_flops / (parts["student forward"] + parts["backward"])
        rows.append(row_of(runner, "student MFU", "", mfu(rate, peak), flops=rate, peak_flops=peak))
    return rows + [row_of(runner, f"part: {name}", "ms", 1e3 * seconds) for name, seconds in parts.items()]


def row_of(runner: Runner, metric: str, unit: str, value: float | str, **more: Any) -> Row:
    """One number."""
    return {"provider": runner.name, "metric": metric, "unit": unit, "value": value, **more}


def exposed_communication(runner: Runner, first: int, ranks: Ranks) -> float:
    """Milliseconds of a step in which communication went on and computing did not: rank 0's, by a trace."""
    clock = PhaseClock(ranks.device)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as tracer:
        runner.run(first, TRACED, clock)
        steps = clock.seconds()
    return float(read_trace(tracer, steps, 0, ranks.device.type)["exposed_communication_ms"])


def mfu(rate: float, peak: float) -> float | str:
    """The share of the peak that is reached, or what to think of a peak that is less than was reached."""
    return rate / peak if rate <= peak else "none: the ceiling is too low, give --flops"


_PEAKS: dict[tuple[torch.device, torch.dtype], float] = {}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest way to a large square product that a model in `dtype` can take, the best of some tries.

    A library may compute in float32 what its CPU has no instructions for, and read the second matrix as a linear layer holds it.
    """
    if (device, dtype) not in _PEAKS:
        ways = [(held, turned) for held in {dtype, torch.float32} for turned in (False, True)]
        _PEAKS[device, dtype] = max(_product_rate(device, held, turned) for held, turned in ways)
    return _PEAKS[device, dtype]


def _product_rate(device: torch.device, dtype: torch.dtype, turned: bool) -> float:
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 8 and sum(times) < 1:  # a product without instructions for its dtype takes seconds
        clock = Runner.clock(device)
        clock.at("losses")
        a @ (b.T if turned else b)
        clock.at("losses")
        clock.end_step()
        times.append(clock.seconds()[0]["losses"])
    return 2 * side**3 / min(times)


def memory_over(config: Config, steps: int, ranks: Ranks, provider: str) -> list[Row]:
    """What lead-ds holds after each fifth of `steps`, and at its peak so far on CUDA."""
    return_freed(ranks.device)
    runner = build_runner(provider, config, ranks)
    rows = []
    for fifth in range(5):
        first = steps * fifth // 5
        runner.run(first, steps * (fifth + 1) // 5 - first, PhaseClock(ranks.device))
        rows.append(row_of(runner, "memory", "MiB", runner.now() / MIB, step=steps * (fifth + 1) // 5))
    growth = rows[-1]["value"] - rows[0]["value"]
    rows.append(row_of(runner, "memory growth from the first to the last fifth", "MiB", growth))
    runner.close()
    return rows


def show(rows: list[Row], title: str) -> None:
    """A table: a line a metric, a column a provider."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(row["provider"] for row in rows))
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        metric = row["metric"] + (f", step {row['step']}" if "step" in row else "")
        value = row["value"]
        shown = value if isinstance(value, str) else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
        cells.setdefault(metric + (f", {row['unit']}" if row["unit"] else ""), {})[row["provider"]] = shown
    for metric, values in cells.items():
        table.add_row(metric, *[values.get(name, "") for name in names])
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def main(given: Sequence[str] | None = None) -> None:
    """Write the models, measure each setting, print, write."""
    options = arguments(given)
    try:
        with ranks() as here, tempfile.TemporaryDirectory() as temporary:
            run(options, here, Path(here.from_main(str(options.folder or temporary))))
    except LeadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)


def run(options: argparse.Namespace, here: Ranks, folder: Path) -> None:
    """Every setting in turn."""
    say: Callable[[str], None] = print if here.main else lambda text: None
    if options.clock == "processor":
        if here.device.type == "cuda":
            raise InputError("--clock", "processor time is not a GPU's", "leave it out")
        Runner.clock = ProcessorClock
    preset = PRESETS.get(options.preset)
    names = (
        options.providers.split(",") if options.providers else list(preset.providers if preset else ("lead-ds", "bare"))
    )
    if here.world > 1:
        names = [name for name in names if name not in ("LEAD's loop", "plain loop")]
    settings = [options.overrides, *([*options.overrides, *more.split()] for more in options.compare)]
    if options.out and here.main:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("")
    if preset:
        weights = "random weights, synthetic texts"
        say(f"{options.preset}: {preset.about}; {weights}; {machine(here.device)}; {here.world} process(es)")
    for overrides in settings:
        config = settings_of(options, folder, overrides)
        if preset:
            if here.main:
                write_files(preset, config, folder, here.world, options.lengths or preset.lengths)
            here.barrier()
        common = {
            "benchmark": "throughput",
            "preset": options.preset or str(options.config),
            "setting": " ".join(overrides),
            "processes": here.world,
            "clock": options.clock,
            "machine": machine(here.device),
            "versions": versions(),
            "date": date.today().isoformat(),
        }
        rows = []
        for row in rows_of(options, config, names, here, say):
            rows.append(row)
            if here.main and options.out:  # at once: the run may be cut off
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**common, **row}) + "\n")
        title = common["setting"] or "as preset"
        if here.main:
            show(rows, title)
        if not options.memory_steps:
            say(f"found: {common['preset']}, {title}: {found(rows)}")


def rows_of(
    options: argparse.Namespace, config: Config, names: Sequence[str], here: Ranks, say: Callable[[str], None]
) -> Iterator[Row]:
    """The rows of one setting, as they come."""
    if options.memory_steps:
        yield from memory_over(config, options.memory_steps, here, names[0])
        return
    preset = PRESETS.get(options.preset)
    if preset and preset.same_losses and here.world == 1 and "LEAD's loop" in names:
        yield from loss_rows(config, here, say)
    warmup, steps = lengths_of(options)
    yield from measure(config, names, here, warmup=warmup, steps=steps, rounds=options.rounds, flops=options.flops)


def found(rows: list[Row]) -> str:
    """In one line: what lead-ds reached, and the others beside it."""
    numbers = {(row["provider"], row["metric"]): row["value"] for row in rows}
    rates = {name: value for (name, metric), value in numbers.items() if metric == "queries per second"}
    said = [f"{name} {rate:,.4g} queries/s" for name, rate in rates.items()]
    for metric, unit in (("overhead ratio", "x the bare models"), ("exposed communication", "ms of a step exposed")):
        value = numbers.get(("lead-ds", metric))
        said += [f"{value:.3g} {unit}"] if isinstance(value, float) else []
    peak = numbers.get(("lead-ds", "peak memory"))
    said += [f"peak {peak / 1024:.3g} GiB"] if isinstance(peak, float) else []
    return "; ".join([*said, *(f"{name} {value}" for (name, metric), value in numbers.items() if metric == "outcome")])


def loss_rows(config: Config, here: Ranks, say: Callable[[str], None]) -> list[Row]:
    """lead-ds's and LEAD's losses on the same first batch and weights, in float32."""
    ours, theirs = same_losses(config, here)
    rows: list[Row] = []
    for name, value in ours.items():
        distance = abs(value - theirs[name]) / max(1.0, abs(value))
        say(f"loss {name}: lead-ds {value:.6f}, LEAD's loop {theirs[name]:.6f}, apart by {distance:.1e} of it")
        for provider, x in (("lead-ds", value), ("LEAD's loop", theirs[name])):
            rows.append({"provider": provider, "metric": f"loss: {name}", "unit": "nats", "value": x})
        if not distance < 1e-4:
            raise LeadError(
                f"loss {name}", f"lead-ds has {value}, LEAD's loop {theirs[name]}", "they must agree to 1e-4"
            )
    return rows


if __name__ == "__main__":
    main()
