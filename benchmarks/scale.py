"""A hundred times the size: how time and memory of each part grow with the data.

    python -m benchmarks.scale [--sizes 100000 1000000 10000000] [--rows open kept encode index mine evaluate pipeline]
        [--folder DIR] [--minutes M] [--out benchmarks/results/scale-cpu.json] [--plot benchmarks/results/scale-cpu.png]

Data are generated: of n passages, n / 10 queries with a group each, and vectors 128 wide. Every step is a process of its own;
counted are its processor time, its wall time and the peak of its own memory (anonymous pages; mapped files are the system's to
take back). Steps that write in streams are killed half way and started again, and what was there before must stay as it was.
A row of results is written when a step ends, and what is there is not measured again: the same command continues. After
--minutes no further step begins. The data of a row are deleted after it. --table prints what was measured; --plot draws it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.kernels import machine
from benchmarks.scale_steps import INDEXES

Row = dict[str, Any]
OUT = Path("benchmarks/results/scale-cpu.json")


@dataclass(frozen=True)
class Step:
    """A step of `benchmarks.scale_steps`. files: what it writes in streams, of which `a` share is there when it is killed."""

    name: str
    files: str = ""
    texts_of_file: int = 0
    kills: int = field(default=1)


ROWS: dict[str, list[Step]] = {
    "open": [Step("index"), Step("open_again")],
    "kept": [
        Step("tokens", "tokens/*/*.idx", 1 << 15),
        Step("read_tokens"),
        Step("teach", "taught/relevance-*.safetensors", 20480),
        Step("read_teach"),
        Step("teach_vectors", "vectors/*-*.safetensors", 4096),
        Step("read_vectors"),
    ],
    "encode": [Step("encode", "encoded/vectors-*.npy", 8192), Step("bare")],
    "index": [Step("make_vectors"), *(Step(f"{what}_{kind}") for kind in INDEXES for what in ("build", "search"))],
    "mine": [Step("mine")],
    "evaluate": [Step("evaluate")],
    "pipeline": [Step("pipeline", "run/stages/*/*.json", 0, kills=3)],
}
GENERATED = {"index"}  # rows that need no collection


def main(given: list[str] | None = None) -> None:
    """Measure what is not in --out yet, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--folder", type=Path, help="where to generate; the system's temporary folder by default")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no step after so many")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--table", action="store_true", help="measure nothing: print what is in --out")
    options = parser.parse_args(given)
    if not options.table:
        folder = options.folder or Path(tempfile.gettempdir()) / "lead-ds-scale"
        until = time.monotonic() + 60 * options.minutes
        for size in options.sizes:
            for row in options.rows:
                measure(row, size, folder / f"{row}-{size}", options.out, until)
    print(table(results(options.out)))
    if options.plot:
        plot(results(options.out), options.plot)


def results(out: Path) -> dict[tuple[str, str, int], Row]:
    """What was measured, the latest of each."""
    lines = out.read_text("utf-8").splitlines() if out.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["row"], row["step"], row["size"]): row for row in rows}


def measure(row: str, size: int, folder: Path, out: Path, until: float = float("inf")) -> None:
    """The steps of a row that are not in `out` yet; its folder is deleted afterwards. until: when no further step begins."""
    steps = [step for step in ROWS[row] if (row, step.name, size) not in results(out)]
    if not steps or time.monotonic() > until:
        return
    steps = steps if folder.exists() else ROWS[row]  # later steps read what earlier ones wrote
    if row not in GENERATED:
        run("generate", size, folder)
    for step in steps:
        if time.monotonic() > until:
            print(f"{row} {size}: out of time before {step.name}; the same command goes on", flush=True)
            return
        found = run(step.name, size, folder, step)
        found |= {
            "machine": machine(torch.device("cpu")),
            "date": date.today().isoformat(),
            "load": round(os.getloadavg()[0], 1),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": row, "step": step.name, "size": size, **found}) + "\n")
        print(f"{row} {step.name} {size}: {found['processor']:.1f} s, {found['own']:.0f} MiB", flush=True)
    shutil.rmtree(folder)


def run(step: str, size: int, folder: Path, how: Step | None = None) -> Row:
    """A step in a process of its own, killed and started again where it writes in streams. Raises RuntimeError where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    files = how.files if how is not None else ""
    kills = how.kills if files and how is not None else 0
    total: Row = {"processor": 0.0, "wall": 0.0, "own": 0.0, "kills": 0, "redone": 0}
    rng = random.Random(size)
    kept: dict[Path, int] = {}
    while True:
        stop = None
        if total["kills"] < kills and how is not None:
            stop = stop_at(how, size, total["kills"], kept, rng)
        ended, found, spent = once(step, size, folder, files, stop)
        for name in ("processor", "wall"):
            total[name] += spent[name]
        total["own"] = max(total["own"], spent["own"])
        now = written(folder, files)
        total["redone"] += sum(now.get(path) != when for path, when in kept.items())
        kept = now
        if ended:
            return {**{name: round(value, 3) for name, value in total.items()}, **found}
        total["kills"] += 1


def stop_at(how: Step, size: int, kills: int, kept: dict[Path, int], rng: random.Random) -> int:
    """How many files are there when the process is killed: half of them, or a few more than before."""
    if how.texts_of_file:
        return max(1, size // how.texts_of_file // 2)
    return len(kept) + rng.randint(0, 2)


def written(folder: Path, files: str) -> dict[Path, int]:
    """Files that are complete and must stay as they are, with the time of their last change."""
    if not files:
        return {}
    found = [path for path in folder.glob(files) if not path.name.startswith(".")]
    if files.endswith(".json"):  # of stages: the records of those that are finished
        found = [path for path in found if path.name == "stage.json" and json.loads(path.read_text())["finished"]]
    return {path: path.stat().st_mtime_ns for path in found}


def once(step: str, size: int, folder: Path, files: str, stop: int | None) -> tuple[bool, Row, Row]:
    """Whether it ended by itself, what it found, and what it took."""
    log = folder / f"{step}.log"
    started, own = time.perf_counter(), 0.0
    with log.open("w+", encoding="utf-8") as file:
        command = [sys.executable, "-m", "benchmarks.scale_steps", step, str(size), str(folder)]
        environment = {**os.environ, "LEAD_DS_CACHE": str(folder / "cache")}
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        killed = False
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            own = max(own, own_memory(process.pid))
            if stop is not None and not killed and len(written(folder, files)) >= stop:
                time.sleep(random.random())
                kill(process.pid)
                killed = True
            time.sleep(0.1)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        said = file.read()
    spent = {"processor": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - started, "own": own}
    if killed and process.returncode == -signal.SIGKILL:
        return False, {}, spent
    if process.returncode:
        raise RuntimeError(f"{step} ended with status {process.returncode}: {said[-2000:]}")
    return True, json.loads(said.splitlines()[-1]), spent


def kill(pid: int) -> None:
    """End a process and all that it started, as a host that dies does: stages of a pipeline are sessions of their own."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def own_memory(pid: int) -> float:
    """MiB of anonymous memory of a process or one of those that it started, whichever has most."""
    found = [0.0]
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")]
    except (psutil.Error, OSError):
        pass
    return max(found)


def table(rows: dict[tuple[str, str, int], Row]) -> str:
    """Markdown: each step at each size, and the exponents by which time and memory grow."""
    lines = [
        "| row | step | passages | processor, s | wall, s | own memory, MiB | time grows as | found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = [(row, step.name) for row, steps in ROWS.items() for step in steps]
    for row, step in order:
        sizes = sorted(size for r, s, size in rows if (r, s) == (row, step))
        for before, size in zip([None, *sizes], sizes, strict=False):
            now = rows[row, step, size]
            grows = "" if before is None else f"n^{exponent(rows[row, step, before], now):.2f}"
            lines.append(
                f"| {row} | {step} | {size:,} | {now['processor']:.1f} | {now['wall']:.1f} | {now['own']:,.0f} | {grows} "
                f"| {told(now)} |"
            )
    return "\n".join(lines)


def exponent(one: Row, other: Row) -> float:
    """e where processor time grows as size ** e."""
    import math

    return math.log(other["processor"] / one["processor"]) / math.log(other["size"] / one["size"])


PLAIN = {"row", "step", "size", "processor", "wall", "own", "machine", "date", "load", "groups", "texts", "windows"}


def told(row: Row) -> str:
    """What a step found, in words."""
    parts = []
    for name, value in row.items():
        if name in PLAIN or (name in ("kills", "redone") and not row["kills"]):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:.3g}" for key, number in value.items())
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts)


def plot(rows: dict[tuple[str, str, int], Row], path: Path) -> None:
    """Processor time and own memory over size, a line for each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6))
    for number, (row, step) in enumerate((row, step.name) for row, steps in ROWS.items() for step in steps):
        sizes = sorted(size for r, s, size in rows if (r, s) == (row, step))
        if len(sizes) < 2:
            continue
        style = {
            "marker": "os^vDP"[number // 10],
            "color": f"C{number % 10}",
            "label": f"{row}: {step}",
            "linewidth": 1,
        }
        for axis, what in zip(axes, ("processor", "own"), strict=True):
            axis.plot(sizes, [rows[row, step, size][what] for size in sizes], **style)
    for axis, what in zip(axes, ("processor time, s", "own memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="passages", title=what)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
