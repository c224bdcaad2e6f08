"""Commands that train: demo, warmup, distill, report."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from lead_ds.cli import options


def distill(
    config: Path = options.CONFIG,
    overrides: list[str] | None = options.OVERRIDES,
    resume: bool = options.RESUME,
    accept_changed: list[str] | None = options.ACCEPT,
    quiet: bool = options.QUIET,
) -> None:
    """Distil a teacher into a student, alone or under any launcher.

    One process:    lead-ds distill run.yaml train.steps=1000

    Eight GPUs:     deepspeed --num_gpus 8 --module lead_ds distill run.yaml

    Writes to the configured output folder: student/ (loads in sentence-transformers), checkpoints/, metrics.jsonl,
    config.yaml, run.json, monitor/ and report/.
    """
    from lead_ds.config import load_config
    from lead_ds.face.distiller import Distiller

    run = Distiller.of(load_config(config, overrides or []))
    run.train(resume, accept_changed=accept_changed or [], quiet=quiet, command=["lead-ds", *sys.argv[1:]])
    say(f"student: {run.folder}")


def warmup(
    config: Path = options.CONFIG,
    overrides: list[str] | None = options.OVERRIDES,
    of: str = typer.Option("student", "--of", help="Which model of the configuration: student or teacher."),
    resume: bool = options.RESUME,
    accept_changed: list[str] | None = options.ACCEPT,
    quiet: bool = options.QUIET,
) -> None:
    """Train one model on labels alone: a dual encoder, a ColBERT or a cross-encoder, alone or under any launcher.

    The student:    lead-ds warmup run.yaml output=runs/student

    The teacher:    deepspeed --num_gpus 8 --module lead_ds warmup run.yaml --of teacher output=runs/teacher

    Then:           lead-ds distill run.yaml teacher.path=runs/teacher/model student.path=runs/student/model

    The contrastive loss of the configuration, over in-batch and hard negatives; a cross-encoder's over the query's own
    passages. A teacher brings its own temperature, lr and lengths. A cross-encoder made of a model without a scoring head
    is given a new one. Writes model/ to the output folder, beside checkpoints/, metrics.jsonl, config.yaml, run.json and
    monitor/.
    """
    from lead_ds.engine.training.warmup import load_warmup, warmup_config
    from lead_ds.face.distiller import Distiller

    run = Distiller.of(warmup_config(load_warmup(config, overrides or []), of), product="model")
    run.train(resume, accept_changed=accept_changed or [], quiet=quiet, command=["lead-ds", *sys.argv[1:]])
    say(f"model: {run.folder}")


def report(
    run: Path = typer.Argument(..., help="The output folder of a run."),
    out: Path | None = typer.Option(None, "--out", help="Where to write; default: RUN/report."),
) -> None:
    """Plots and a summary of a run: loss parts, layer weights over time, metrics. PNG files and one HTML page."""
    from lead_ds.report import write_report

    print(write_report(run, out))


def demo(
    out: Path = typer.Option(Path("runs/demo"), "--out", help="Where to write; a finished demo there is shown again."),
    processes: int = typer.Option(2, "--processes", min=1, help="Processes that share the teacher."),
    steps: int = typer.Option(60, "--steps", min=1, help="Training steps, for each of the three students."),
    prompt: bool = typer.Option(True, help="End with a query prompt where a person watches."),
) -> None:
    """See it work in ten minutes: no GPU, no network.

    Python functions of this machine become a collection (what a function does -> its code). A packaged six-layer
    sentence model, sharded over the processes by ZeRO-3, teaches its last three layers on texts that nobody judged. These
    are then trained on few judged queries, and so are the same layers without a teacher. Ends with a table of what each
    is worth on modules that training never saw.
    """
    from lead_ds.demo.run import run_demo

    run_demo(out, processes=processes, steps=steps, prompt=prompt)


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (demo, warmup, distill, report):
        app.command()(command)


def say(text: str) -> None:
    from lead_ds.engine.distributed.ranks import launched_rank

    if launched_rank() == 0:
        print(text)
