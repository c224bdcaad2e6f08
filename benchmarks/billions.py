"""Teachers of 0.6, 1.1 and 1.7 billion parameters, really run on a CPU beside a small student.

    python -m benchmarks.billions [--models qwen3-0.6b tinyllama-1.1b qwen3-1.7b] [--placements zero3 cpu nvme replicate]
        [--parts alone distill teach cached adapter] [--steps 30] [--folder DIR] [--out benchmarks/results/billions-cpu.json]
        [--table]

Weights are random, in bf16, written once; texts are synthetic and short. zero3, cpu and nvme (ZeRO-3, and with the shards in
memory or on disk) run on two processes, replicate on one. alone: loading, bytes held between forwards, forwards, gathers.
distill: steps with the teacher beside the student, three layers captured; killed and resumed. teach: the teacher's vectors
into a cache. cached: distilled from that. adapter: alone, of a LoRA adapter over the base. Memory of each process is held
against `lead-ds plan`. Rows are appended to --out as they come, and what is there is not run again. A model's weights are
deleted after its parts, unless --keep. --table measures nothing and prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import machine
from benchmarks.throughput_presets import bert, write_data, write_model

Row = dict[str, Any]
OUT = Path("benchmarks/results/billions-cpu.json")
MIB = 2**20
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {**QWEN, "hidden_size": 1024, "intermediate_size": 3072},
    "tinyllama-1.1b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    },
    "qwen3-1.7b": {**QWEN, "hidden_size": 2048, "intermediate_size": 6144},
}  # fmt: skip
PLACEMENTS = {
    "zero3": {"placement": "zero3"},
    "cpu": {"placement": "zero3", "offload": "cpu"},
    "nvme": {"placement": "zero3", "offload": "nvme"},
    "replicate": {"placement": "replicate"},
}
PLANNED = {"zero3": "zero3", "cpu": "zero3+cpu", "nvme": "zero3+nvme", "replicate": "replicate"}
PARTS = ("alone", "distill", "teach", "cached", "adapter")
BATCH, GROUP, QUERY, PASSAGE = 2, 2, 8, 32


def main(given: list[str] | None = None) -> None:
    """Measure what is not in --out yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--placements", nargs="*", choices=list(PLACEMENTS), default=list(PLACEMENTS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lead-ds-billions")
    parser.add_argument("--keep", action="store_true", help="the weights, for another call")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(given)
    if not options.table:
        for name in options.models:
            Model(name, options).measure()
    print(table(read(options.out)))


def read(out: Path) -> list[Row]:
    """The rows that were measured."""
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


class Model:
    """A teacher's directory, and its rows."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.out = name, options, options.out
        self.folder: Path = options.folder / name
        done = {(row["placement"], row["part"]) for row in read(self.out) if row["model"] == name}
        wanted = [
            (placement, part)
            for placement in options.placements
            for part in options.parts
            # One cache, and what is distilled from it, is enough; so is an adapter on two placements.
            if (part not in ("teach", "cached") or placement in ("zero3", "replicate"))
            and (part != "adapter" or (name == "qwen3-0.6b" and placement in ("zero3", "replicate")))
        ]
        self.todo = [one for one in wanted if one not in done]

    def measure(self) -> None:
        """Every part that has no row yet; the weights are deleted afterwards."""
        if not self.todo:
            return
        self.prepare()
        for placement, part in self.todo:
            try:
                row = getattr(self, part)(placement)
            except RuntimeError as error:
                print(f"{self.name} {placement} {part}: {error}", flush=True)
                continue
            self.write(placement, part, row)
        if not self.options.keep:
            shutil.rmtree(self.folder)

    def prepare(self) -> None:
        """Weights, a student without weights, and texts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "teacher" / "model.safetensors").exists():
            spec = {"shape": SHAPES[self.name], "folder": str(self.folder / "teacher")}
            print(f"{self.name}: {self.run('weights', spec, 1)[0]}", flush=True)
        write_model(self.folder / "student", bert(4, 256, 4, vocab_size=1000), "dual_encoder")
        write_data(self.folder / "data", 2 * BATCH * max(self.options.steps, 8), GROUP, QUERY, PASSAGE, "full")

    def write(self, placement: str, part: str, row: Row) -> None:
        """Append a row, with where and with what it was measured."""
        names = ("torch", "transformers", "deepspeed")
        row = {"model": self.name, "placement": placement, "part": part, **row}
        row |= {"machine": machine(torch.device("cpu")), "load": round(os.getloadavg()[0], 1)}
        row |= {"versions": {name: version(name) for name in names}, "date": date.today().isoformat()}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.name} {placement} {part}: done", flush=True)

    def tree(self, placement: str) -> Row:
        """The run's configuration."""
        lengths = {"query_length": QUERY, "passage_length": PASSAGE}
        teacher: Row = {"kind": "dual_encoder", "path": str(self.folder / "teacher"), "dtype": "bf16", **lengths}
        teacher |= {"pooling": "last", "normalize": True, "scale": "cosine", **PLACEMENTS[placement]}
        if placement == "nvme":
            teacher["offload_path"] = str(self.folder / "nvme")
        student = {
            "path": str(self.folder / "student"),
            "weights": "random",
            "pooling": "cls",
            "dtype": "fp32",
            **lengths,
        }
        losses = {
            "response": {"teacher_temperature": 0.05},
            "layer": {"teacher_temperature": 0.05, "select": "last", "k": 3},
        }
        train = {
            "steps": self.options.steps,
            "batch_size": BATCH,
            "save_every": 10,
            "evaluate_every": 0,
            "log_every": 1,
        }
        return {
            "teacher": teacher,
            "student": student,
            "losses": losses,
            "train": train,
            "data": {"path": str(self.folder / "data"), "negatives": GROUP - 1},
            "evaluation": {"split": None},
            "monitor": {"tensorboard": False, "csv": False},
            "output": str(self.folder / f"run-{placement}"),
        }

    def world(self, placement: str) -> int:
        """Processes."""
        return 1 if placement == "replicate" else 2

    def alone(self, placement: str) -> Row:
        """See `billions_steps.alone`."""
        world = self.world(placement)
        return {"ranks": self.run("alone", {"config": self.tree(placement)}, world), "plan": self.plan(placement)}

    def adapter(self, placement: str) -> Row:
        """The same, of an adapter; the first call merges it."""
        spec = {"base": str(self.folder / "teacher"), "folder": str(self.folder / "adapter")}
        if not Path(spec["folder"]).exists():
            self.run("adapter", spec, 1)
        tree = self.tree(placement)
        tree["teacher"]["path"] = spec["folder"]
        return {"ranks": self.run("alone", {"config": tree}, self.world(placement)), "plan": self.plan(placement)}

    def teach(self, placement: str) -> Row:
        """Vectors of three layers and the final state."""
        cache = self.folder / f"cache-{placement}"
        shutil.rmtree(cache, ignore_errors=True)
        return {
            "ranks": self.run("teach", {"config": self.tree(placement), "cache": str(cache)}, self.world(placement))
        }

    def cached(self, placement: str) -> Row:
        """Distilled from what `teach` kept, on as many processes."""
        tree = self.tree(placement)
        cache = self.folder / f"cache-{placement}"
        if not cache.exists():
            self.teach(placement)
        tree["teacher"] = {"kind": "cached", "path": str(cache)}
        tree["output"] += "-cached"
        return self.killed(tree, self.world(placement))

    def distill(self, placement: str) -> Row:
        """Steps with the teacher beside the student."""
        return {**self.killed(self.tree(placement), self.world(placement)), "plan": self.plan(placement)}

    def killed(self, tree: Row, world: int) -> Row:
        """A run that is killed half way between two checkpoints, and resumed; losses of steps that were taken twice."""
        output = Path(tree["output"])
        shutil.rmtree(output, ignore_errors=True)
        every = tree["train"]["save_every"] = max(2, tree["train"]["steps"] // 3)
        self.run("distill", {"config": tree}, world, stop=(output / "metrics.jsonl", every + every // 2))
        before = losses_of(output / "metrics.jsonl")
        ranks = self.run("distill", {"config": tree, "resume": True}, world)
        after = losses_of(output / "metrics.jsonl")
        twice = [step for step in before if step > every and step in after]
        equal = all(before[step] == after[step] for step in twice)
        return {
            "ranks": ranks,
            "steps": max(after),
            "killed_after": max(before),
            "taken_twice": len(twice),
            "equal": equal,
        }

    def plan(self, placement: str) -> Row:
        """MiB of each process by part, as `lead-ds plan` has them; what it keeps for CUDA is left out.

        gloo: a CPU's collectives write into a copy of their own, which NCCL does not have.
        """
        from lead_ds.config.load import parse_config
        from lead_ds.plan import Cluster, make_plan
        from lead_ds.plan.requirements import requirements

        config = parse_config(self.tree(placement), "benchmarks.billions")
        world = self.world(placement)
        required = requirements(config)
        made = make_plan(required, Cluster(world, 1, 80 * 10**9))
        estimate = next(one for one in made.placements if one.choice.placement == PLANNED[placement])
        parts = {name: size / MIB for name, size in estimate.uses.items() if name != "context and slack"}
        gloo = 2 * required.teachers[0].shape.largest_gather / MIB if placement != "replicate" else 0.0
        held = {"host": estimate.host / world / MIB, "disk": estimate.disk / world / MIB}
        return {"parts": parts, "gloo": gloo, **held}

    def run(self, step: str, spec: Row, world: int, stop: tuple[Path, int] | None = None) -> list[Row]:
        """A step on so many processes: what each found. stop: kill them once that file has so many lines, and return nothing.

        Raises RuntimeError where one of them fails.
        """
        from lead_ds.engine.distributed.ranks import free_port

        path, out = self.folder / "spec.json", self.folder / f"found-{step}"
        path.write_text(json.dumps(spec), encoding="utf-8")
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        place |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "LEAD_DS_CACHE": str(self.folder / "kept")}
        command = [sys.executable, "-m", "benchmarks.billions_steps", step, str(path), str(out)]
        processes = []
        for rank in range(world):
            environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = (self.folder / f"{step}.{rank}.log").open("w")
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            log.close()
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                if stop is not None and len(losses_of(stop[0])) >= stop[1]:
                    return []
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
        if failed is not None or stop is not None:
            said = (self.folder / f"{step}.{failed or 0}.log").read_text("utf-8")[-3000:]
            raise RuntimeError(f"{step} failed on process {failed}: {said}")
        return [json.loads(Path(f"{out}.{rank}.json").read_text("utf-8")) for rank in range(world)]


def losses_of(path: Path) -> dict[int, float]:
    """The loss of each step in a run's metrics; a line that is half written is left out."""
    found = {}
    for line in path.read_text("utf-8").split("\n")[:-1] if path.exists() else []:
        row = json.loads(line)
        if "loss" in row:
            found[row["step"]] = row["loss"]
    return found


def table(rows: list[Row]) -> str:
    """Markdown: a table a part."""
    from benchmarks.billions_table import tables

    return tables(rows)


if __name__ == "__main__":
    main()
