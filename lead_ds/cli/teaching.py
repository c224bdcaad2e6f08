"""The command that runs the teacher once, so that many distillations need not: teach."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from lead_ds.cli.training import CONFIG, OVERRIDES, _say


def teach(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    out: Path | None = typer.Option(None, "--out", help="Where the cache goes; default: OUTPUT/teacher_cache."),
    epochs: int | None = typer.Option(
        None,
        "--epochs",
        min=1,
        help="Epochs whose random negatives are included, where groups list too few; default: as many as train.steps take.",
    ),
    shard_groups: int | None = typer.Option(None, "--shard-groups", min=1, help="Groups of a file; default: by kind."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
) -> None:
    """Write the teacher's relevance of every training group, from every layer, to a cache; `distill` then needs no teacher.

    One process:    lead-ds teach run.yaml --out cache

    Eight GPUs:     deepspeed --num_gpus 8 --module lead_ds teach run.yaml --out cache

    Then:           lead-ds distill run.yaml teacher.kind=cached teacher.path=cache

    Holds every positive and negative that a group lists, for any seed. Run it again after a kill to finish.
    """
    from lead_ds.config import load_config
    from lead_ds.engine.teach import teach as run

    settings = load_config(config, overrides or [])
    folder = out or Path(settings.output) / "teacher_cache"
    command = ["lead-ds", *sys.argv[1:]]
    cache = run(settings, folder, epochs=epochs, shard_groups=shard_groups, command=command, quiet=quiet)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _say(f"{len(cache)} groups, {cache.num_layers} layers and the final one, {size / 1e6:.1f} MB: {folder}")
    _say(f"distil from it: lead-ds distill {config} teacher.kind=cached teacher.path={folder}")


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command()(teach)
