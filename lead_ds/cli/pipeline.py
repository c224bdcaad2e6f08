"""The command that runs the others: pipeline."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import typer

from lead_ds.cli import options
from lead_ds.errors import InputError

RECIPE = typer.Argument(..., help="A YAML configuration; see ds_configs/recipes/.", metavar="RECIPE")


def pipeline(
    recipe: Path = RECIPE,
    overrides: list[str] | None = options.OVERRIDES,
    stages: str | None = typer.Option(None, "--stages", help="Only these, such as mine,distill."),
    first: str | None = typer.Option(None, "--from", help="Begin with this stage; those before must be complete."),
    until: str | None = typer.Option(None, "--until", help="End after this stage."),
    again: str | None = typer.Option(
        None,
        "--again",
        help="Run these again although they are complete; their earlier output is kept under another name.",
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show stages, how far each is and its command; run nothing."),
    launcher: str | None = typer.Option(
        None,
        "--launcher",
        help="What stands for lead-ds in stages of many processes; none: one process. Default: pipeline.launcher.",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print stages and results as JSON; all else goes to stderr."),
) -> None:
    """The whole LEAD recipe from one file; run it again to continue: what is complete is skipped.

    negatives (BM25) -> first retriever -> mine hard negatives -> warm up teacher and student -> lens, cache of the teacher ->
    distil -> encode -> index -> search -> evaluate. Each stage is a command of lead-ds that is shown as it is run.

    See the stages: lead-ds pipeline run.yaml --dry-run

    Run, continue:  lead-ds pipeline run.yaml

    A part of it:   lead-ds pipeline run.yaml --until mine

    Eight GPUs:     lead-ds pipeline run.yaml --launcher "deepspeed --num_gpus 8 --module lead_ds"

    By a script:    lead-ds pipeline run.yaml --launcher launch/local.sh

    The section `pipeline:` of the file chooses the stages and what each of them has otherwise than the rest of it. Writes
    to the configured output folder: stages/ (one folder for each, named after what decides it), student, results.json,
    results.md and results.html.
    """
    from lead_ds.pipeline.run import Choice, run_pipeline

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = "was itself started by a launcher"
        raise InputError("pipeline", what, "start it alone, and name the launcher of its stages: --launcher")

    def tell(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    tree = run_pipeline(
        recipe,
        overrides or [],
        choice=Choice(listed(stages), first, until, listed(again)),
        dry_run=dry_run,
        launcher=launcher,
        tell=tell,
    )
    if as_json:
        print(json.dumps(tree, indent=1))


def listed(names: str | None) -> list[str]:
    """Names of a comma-separated list."""
    return [name for name in (names or "").replace(",", " ").split() if name]


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command()(pipeline)
