"""The same distillation by lead-ds and by other libraries, side by side in one run.

    python -m benchmarks.peers --data DATA --models MODELS [--pylate PYTHON] [--tevatron PYTHON]
        [--only kl margin ...] [--rounds 1] [--work FOLDER] [--out benchmarks/results/peers-cpu.json] [--table]

DATA is a collection with train and dev judgements; MODELS holds minilm-l3 (the student), reranker-l12 and bge-small (the
teachers). PYTHON is the interpreter of an environment with pylate 1.6, or with tevatron 0.1.0 and transformers 4.45. Every
library trains on the same batches in the same order, from the same weights, with the same cached scores or vectors, loss,
optimizer and number of steps; dropout is off, so that their losses can be compared step by step. Each run is a process of
its own; they take turns. Rows are appended to --out as they come, and what is there is not run again. --table measures
nothing and prints what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers_data
from benchmarks.kernels import machine
from benchmarks.peers_more import ROWS as MORE

Row = dict[str, Any]
OUT = Path("benchmarks/results/peers-cpu.json")
THEIRS = Path(__file__).with_name("peers_theirs.py")
WARM = 2  # steps that are not counted

# Of each loss: who runs it, by a name, the library, its precision, and lead-ds's sections beside the defaults.
BF16 = {"student": {"dtype": "bf16"}}
RUNS: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "kl": {
        "lead-ds": ("lead-ds", "fp32", {}),
        "sentence-transformers": ("sentence-transformers", "fp32", {}),
        "lead-ds, bf16": ("lead-ds", "bf16", BF16),
        "sentence-transformers, bf16": ("sentence-transformers", "bf16", {}),
        "lead-ds, bf16, passes null": ("lead-ds", "bf16", {"student": {"dtype": "bf16", "passes": None}}),
        "lead-ds, bf16, checkpointing": ("lead-ds", "bf16", {**BF16, "train": {"gradient_checkpointing": True}}),
    },
    **{
        loss: {
            "lead-ds": ("lead-ds", "fp32", {}),
            "sentence-transformers": ("sentence-transformers", "fp32", {}),
        }
        for loss in ("margin", "embed", "labels")
    },
    "colbert": {"lead-ds": ("lead-ds", "fp32", {}), "PyLate": ("pylate", "fp32", {})},
    "dot": {"lead-ds": ("lead-ds", "fp32", {}), "Tevatron": ("tevatron", "fp32", {})},
}
OTHER_PYTHONS = {"colbert": "pylate", "dot": "tevatron"}
NAMES = {
    "kl": "KL of a reranker's scores (DistillKLDivLoss)",
    "margin": "margin-MSE of a reranker's scores (MarginMSELoss)",
    "embed": "vectors of a dual encoder (EmbedDistillLoss)",
    "labels": "labels alone (MultipleNegativesRankingLoss)",
    "colbert": "ColBERT, KL of a reranker's scores (PyLate's Distillation)",
    "dot": "labels alone, dot product of [CLS] (Tevatron)",
}


def main(given: list[str] | None = None) -> None:
    """Measure what is not in --out yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--pylate", type=Path, help="the interpreter of an environment with pylate")
    parser.add_argument("--tevatron", type=Path, help="the interpreter of an environment with tevatron")
    parser.add_argument("--only", nargs="*", choices=[*RUNS, *MORE], default=[*RUNS, *MORE])
    parser.add_argument("--rounds", type=int, default=1, help="of kl; the others take one")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8, help="queries of a step")
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text at most")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument(
        "--work", type=Path, help="for data, caches and students; the system's temporary folder by default"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args(given)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not options.table:
        if options.data is None or options.models is None:
            parser.error("--data and --models are needed")
        options.work = options.work or Path(tempfile.gettempdir()) / "lead-ds-peers"
        measure(options)
    print(table(read(options.out)))


def read(out: Path) -> list[Row]:
    """The rows that were measured."""
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


def write(out: Path, row: Row) -> None:
    """Append a row, with where and with what it was measured."""
    names = ("torch", "transformers", "sentence-transformers", "deepspeed")
    row |= {
        "machine": machine(torch.device("cpu")),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in names},
        "date": date.today().isoformat(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['loss']}, {row['name']}, round {row.get('round', 0)}: done", flush=True)


def measure(options: argparse.Namespace) -> None:
    """Every run of --only that has no row yet."""
    work: Path = options.work
    size = {name: getattr(options, name) for name in ("steps", "batch", "negatives", "length", "lr")}
    peers_data.build(work / "data", options.data, options.steps * options.batch, options.negatives)
    peers_data.student(work / "student", options.models / "minilm-l3")
    peers_data.plain(work / "plain", options.models / "minilm-l3")
    done = {(row["loss"], row["name"], row.get("round", 0)) for row in read(options.out)}
    for loss in options.only:
        if loss in MORE:
            for row in MORE[loss](work, options.models, size, {name for what, name, _ in done if what == loss}):
                write(options.out, {"loss": loss, "round": 0, "size": size, **row})
            continue
        if (needed := OTHER_PYTHONS.get(loss)) and getattr(options, needed) is None:
            print(f"{loss}: left out, without --{needed}", flush=True)
            continue
        for turn in range(options.rounds if loss == "kl" else 1):
            order = list(RUNS[loss])
            for name in order if turn % 2 == 0 else order[::-1]:
                if (loss, name, turn) in done:
                    continue
                try:
                    row = once(loss, name, options, size)
                except RuntimeError as error:  # the others are worth having
                    print(f"{loss}, {name}: {error}", flush=True)
                    continue
                write(options.out, {"loss": loss, "name": name, "round": turn, "size": size, **row})


def once(loss: str, name: str, options: argparse.Namespace, size: dict[str, Any]) -> Row:
    """One run of a library."""
    library, precision, sections = RUNS[loss][name]
    work: Path = options.work
    begun = work / "student"
    if loss == "colbert":
        begun = work / "colbert"
        if not begun.exists():
            spec = {
                "library": "make-colbert",
                "student": str(work / "plain"),
                "length": size["length"],
                "out": str(begun),
            }
            run([str(options.pylate), str(THEIRS)], spec, work)
    if loss == "dot":
        begun = work / "plain"
    tree = peers_data.configuration(work, options.models, loss, size, str(begun))
    tree = peers_data.taught(work, tree, loss)
    tree["student"]["dtype"] = "fp32"
    for section, settings in sections.items():
        tree[section] |= settings
    out = work / "runs" / f"{loss}-{name.replace(', ', '-').replace(' ', '-')}"
    shutil.rmtree(out, ignore_errors=True)
    tree["output"] = str(out)
    if library == "lead-ds":
        found = run([sys.executable, "-m", "benchmarks.peers_ours"], tree, work)
        model = out / "student"
    else:
        batches = work / f"batches-{loss}.jsonl"
        if not batches.exists():
            peers_data.batches(peers_data.written(work / "batches.yaml", tree), batches)
        train = tree["train"]
        spec = {"library": library, "loss": loss, "student": str(begun), "batches": str(batches), "out": str(out)}
        spec |= {"precision": precision, "batch": train["batch_size"], "lr": train["lr"], "length": size["length"]}
        spec["query_length"] = tree["student"].get("query_length")
        python = getattr(options, library, None) or sys.executable
        found = run([str(python), str(THEIRS)], spec, work)
        model = out
    student, queries = tree["student"], tree["train"]["batch_size"]
    # A directory of transformers alone does not say how it is read.
    read = (
        {name: student[name] for name in ("query_length", "passage_length", *peers_data.READ[loss])}
        if loss == "dot"
        else {}
    )
    found["queries_per_second"] = {
        clock: queries / statistics.mean(found[clock][WARM - 1 :]) for clock in ("processor", "wall")
    }
    return {**found, "library": library, "precision": precision, "nDCG@10": quality(model, work, read)}


def run(command: list[str], spec: dict[str, Any], work: Path) -> Row:
    """A process with its specification in a file; the JSON of its last line. Raises RuntimeError where it fails."""
    path = peers_data.written(work / "spec.json", spec)
    environment = {
        **os.environ,
        "PEERS_STARTED": str(time.time()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    ended = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def quality(model: Path, work: Path, read: dict[str, Any]) -> float:
    """nDCG@10 of the dev queries, by lead-ds for every library's model: the corpus searched, or BM25's 30 best reranked."""
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.retrieval.evaluate import Task, evaluate_model
    from lead_ds.retrieval.rerank import Reranker, evaluate_reranked, find_candidates

    dataset = Dataset.open(work / "data")
    settings = [f"{name}={json.dumps(value)}" for name, value in read.items()]
    task, opened = Task(dataset, "dev", ["nDCG@10"]), Reranker.open(str(model), None, settings, torch.device("cpu"))
    if opened.scorer.gives_vectors:
        return evaluate_model(opened.scorer, opened.encoder, task, batch_size=16).mean["nDCG@10"]
    found = find_candidates(dataset, dataset.qrels("dev"), 30, None)
    return evaluate_reranked(opened.scorer, opened.encoder, task, found, batch_size=16, quiet=True).mean["nDCG@10"]


def table(rows: list[Row]) -> str:
    """Markdown: each run beside the first of its loss, medians over rounds."""
    lines = []
    for loss, name in NAMES.items():
        mine = [row for row in rows if row["loss"] == loss]
        if not mine:
            continue
        lines += [
            f"\n**{name}**\n",
            "| | queries/s of processor time | by the clock | first step after, s (clock) | peak, MiB | of it in training | "
            "largest difference of a loss | nDCG@10 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        reference = next((row for row in mine if row["library"] != "lead-ds"), mine[0])
        for run_name in dict.fromkeys(row["name"] for row in mine):
            lines.append(line(run_name, [row for row in mine if row["name"] == run_name], reference))
    more = [row for row in rows if row["loss"] in MORE]
    if more:
        lines += ["\n| row | what | value |", "|---|---|---|"]
        lines += [f"| {row['loss']} | {row['name']} | {row['shown']} |" for row in more]
    return "\n".join(lines)


def line(name: str, rows: list[Row], reference: Row) -> str:
    """A row of the table."""

    def median(*keys: str) -> float:
        values = []
        for row in rows:
            value: Any = row
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    pairs = zip(rows[0]["losses"], reference["losses"], strict=False)
    difference = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    cells = [
        f"{median('queries_per_second', 'processor'):.2f}",
        f"{median('queries_per_second', 'wall'):.2f}",
        f"{median('first', 'processor'):.1f} ({median('first', 'wall'):.1f})",
        f"{median('peak'):,.0f}",
        f"{median('peak') - median('before'):,.0f}",
        f"{difference:.1e}",
        f"{rows[0]['nDCG@10']:.4f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
