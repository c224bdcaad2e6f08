"""A run that is continued on another number of GPUs, beside one that never stopped: the losses must be the same.

    python -m benchmarks.resume --processes 8 --out resume.json     # 8 to 4 and 4 to 8 GPUs, ZeRO-1 and ZeRO-3
    python -m benchmarks.resume --processes 2 --out resume.json     # without a GPU: processes on the CPU, over gloo

The pair of `benchmarks.first` is trained for 8 steps with a checkpoint at the fourth; a copy goes on from there. Writes one
JSON object a line, as they come. Ends with status 1 where a loss is another.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.first import write_pair

STEPS, HALF = 8, 4
# Ranks add in another order: in bfloat16 that shows in the third digit, in float32 in the sixth.
ALLOWED = {"bf16": 2e-2, "fp32": 1e-5}


def configuration(folder: Path, name: str, stage: int, dtype: str, batch: int) -> Path:
    """A configuration file of the pair's run, into `folder`/`name`."""
    tree: dict[str, Any] = json.loads((folder / "tree.json").read_text())
    for model in ("teacher", "student"):
        tree[model]["dtype"] = dtype
    # The mean over a rank's tokens depends on which texts are on which rank: attention maps are not compared here.
    tree["losses"]["attention"] = {"weight": 0.0}
    tree["teacher"]["placement"] = "zero3" if stage == 3 else "replicate"
    tree["train"] |= {"steps": STEPS, "save_every": HALF, "keep": STEPS, "batch_size": batch}
    tree["deepspeed"] = {"student": {"zero_optimization": {"stage": stage}}}
    tree["output"] = str(folder / name)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))  # which YAML reads
    return path


def run(config: Path, processes: int, *more: str) -> list[float]:
    """The losses of `lead-ds distill` on so many processes. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*command, "-m", "lead_ds", "distill", str(config), *more], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line and "torch.distributed" not in line]
        raise RuntimeError((lines or done.stderr.splitlines() or ["it failed"])[0][:300])
    output = Path(json.loads(config.read_text())["output"])
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def halfway(folder: Path, source: str, name: str, stage: int, dtype: str, batch: int) -> Path:
    """The configuration of a copy of a run as it was at step HALF."""
    shutil.copytree(folder / source, folder / name)
    shutil.rmtree(folder / name / "checkpoints" / f"step-{STEPS:08d}")
    return configuration(folder, name, stage, dtype, batch)


def main() -> None:
    """Run, copy, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="the larger of the two numbers")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], help="ZeRO stages of the student")
    parser.add_argument("--out", type=Path, required=True, help="where to write the rows")
    given = parser.parse_args()
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    many, few = given.processes, given.processes // 2 if given.processes % 2 == 0 else 1
    batch = max(1, 8 // (many * few))  # groups of a step: batch x many x few
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("")
    good, told = True, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_pair(Path(temporary))
        for stage in given.stages:
            for one, other in ((many, few), (few, many)):
                start, name = time.perf_counter(), f"zero{stage}-{one}-to-{other}"
                row: dict[str, Any] = {
                    "stage": stage,
                    "from": one,
                    "to": other,
                    "dtype": dtype,
                    "allowed": ALLOWED[dtype],
                }
                try:
                    whole = run(configuration(folder, f"whole-{name}", stage, dtype, batch * (many * few // one)), one)
                    copy = halfway(folder, f"whole-{name}", name, stage, dtype, batch * (many * few // other))
                    losses = run(copy, other, "--resume")
                    error = max(abs(a - b) / abs(b) for a, b in zip(losses, whole, strict=True))
                    row |= {"error": error, "right": error <= ALLOWED[dtype], "losses": losses, "uninterrupted": whole}
                except RuntimeError as problem:
                    row |= {"right": False, "problem": str(problem)}
                row["seconds"] = round(time.perf_counter() - start, 2)
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                said = row.get("problem") or f"losses apart by {row['error']:.1e} of {row['allowed']:.0e} allowed"
                told.append(f"ZeRO-{stage}, {one} to {other}: {'' if row['right'] else 'WRONG: '}{said}")
                print(told[-1], flush=True)
                good = good and row["right"]
    print(f"found: {'; '.join(told)}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
