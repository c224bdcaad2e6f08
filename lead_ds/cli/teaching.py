"""The command that runs the teacher once, so that many distillations need not: teach."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lead_ds.cli.training import CONFIG, OVERRIDES, say

if TYPE_CHECKING:
    from lead_ds.config import Config

LENS = "Of --fit-lens"


def teach(
    config: Path = CONFIG,
    overrides: list[str] | None = OVERRIDES,
    out: Path | None = typer.Option(
        None, "--out", help="Where the cache goes, or the lens; default: OUTPUT/teacher_cache, teacher.lens_path."
    ),
    epochs: int | None = typer.Option(
        None,
        "--epochs",
        min=1,
        help="Epochs whose random negatives are included, where groups list too few; default: as many as train.steps take.",
    ),
    vectors: str | None = typer.Option(
        None,
        "--vectors",
        metavar="LAYERS",
        help="Of a dual encoder, keep vectors of every query and passage, of these layers and the final one: 9,10,11 or "
        "last:3, all, final (no layer besides), auto (those that losses.layer reads).",
    ),
    shard_groups: int | None = typer.Option(None, "--shard-groups", min=1, help="Groups of a file; default: by kind."),
    shard_texts: int | None = typer.Option(
        None, "--shard-texts", min=1, help="Of --vectors: texts of a file; default: 4096, or fewer for many processes."
    ),
    fit_lens: bool = typer.Option(
        False, "--fit-lens", help="Fit the teacher's tuned lens instead: a read-out of its own for each layer."
    ),
    lens_groups: int | None = typer.Option(
        None, "--lens-groups", min=1, help=f"{LENS}: training groups to read, drawn by the seed; default: 2000."
    ),
    held_out: float | None = typer.Option(
        None, "--held-out", help=f"{LENS}: part of them to stop by, and as much again to report on; default: 0.1."
    ),
    lens_steps: int | None = typer.Option(None, "--lens-steps", min=1, help=f"{LENS}: steps of Adam; default: 400."),
    lens_lr: float | None = typer.Option(None, "--lens-lr", help=f"{LENS}: learning rate; default: 0.003."),
    lens_rank: int | None = typer.Option(
        None, "--lens-rank", min=1, help=f"{LENS}: rank of a dual encoder's maps; default: 64."
    ),
    lens_target: str | None = typer.Option(
        None, "--lens-target", help=f"{LENS}: labels, or final: the teacher's own final distribution; default: labels."
    ),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress."),
) -> None:
    """Write the teacher's relevance of every training group, from every layer, to a cache; `distill` then needs no teacher.

    One process:    lead-ds teach run.yaml --out cache

    Eight GPUs:     deepspeed --num_gpus 8 --module lead_ds teach run.yaml --out cache

    Then:           lead-ds distill run.yaml teacher.kind=cached teacher.path=cache

    Holds every positive and negative that a group lists, for any seed. Run it again after a kill to finish.

    Such a cache compares a query with its own passages. A dual encoder compares it with every passage of the batch, and so
    does a cache of its vectors, which is larger: each text once, 2 bytes x width x (layers + 1). It takes any
    losses.layer that reads no other layers, any losses and any teacher.scale:

    lead-ds teach run.yaml --vectors last:3 --out vectors

    lead-ds distill run.yaml teacher.kind=cached teacher.path=vectors losses.layer.select=last losses.layer.k=3

    A teacher's lower layers know more than they can say through its head. First fit each a small read-out of its own, on
    some training groups, with the teacher frozen; then teach, or distil, through it:

    lead-ds teach run.yaml --fit-lens

    lead-ds distill run.yaml teacher.lens=tuned losses.layer.select=informative
    """
    from lead_ds.config import load_config

    settings = load_config(config, overrides or [])
    asked: dict[str, Any] = {
        "groups": lens_groups,
        "held_out": held_out,
        "steps": lens_steps,
        "lr": lens_lr,
        "rank": lens_rank,
        "target": lens_target,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if fit_lens:
        if {epochs, shard_groups, vectors, shard_texts} != {None}:
            raise typer.BadParameter("--epochs, --vectors and --shard-... are of a cache, not of --fit-lens")
        _fit_lens(settings, out or settings.lens_folder, asked, config, quiet)
        return
    if asked:
        raise typer.BadParameter("the options of a lens go with --fit-lens")
    if (shard_groups if vectors is not None else shard_texts) is not None:
        raise typer.BadParameter("--shard-texts goes with --vectors, --shard-groups without")
    folder = out or Path(settings.output) / ("teacher_cache" if vectors is None else "teacher_vectors")
    _teach(settings, folder, config, quiet, vectors=vectors, epochs=epochs, shard_size=shard_groups or shard_texts)


def _teach(settings: Config, folder: Path, config: Path, quiet: bool, **options: Any) -> None:
    from lead_ds.report.lens import layer_table
    from lead_ds.teachers.teach import teach as run

    command = ["lead-ds", *sys.argv[1:]]
    cache = run(settings, folder, command=command, quiet=quiet, **options)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    say(layer_table(cache.manifest["measured"]))
    say(f"\n{len(cache)} groups, {cache.held()}, {size / 1e6:.1f} MB: {folder}")
    say(f"distil from it: lead-ds distill {config} teacher.kind=cached teacher.path={folder}")


def _fit_lens(settings: Config, folder: Path, asked: dict[str, Any], config: Path, quiet: bool) -> None:
    from lead_ds.report.lens import lens_table
    from lead_ds.teachers.fit_lens import fit_lens, fit_settings

    record = fit_lens(settings, folder, fit_settings(asked), command=["lead-ds", *sys.argv[1:]], quiet=quiet)
    size = sum(file.stat().st_size for file in (folder / "states").glob("*"))
    say(lens_table(record))
    say(f"\nlens: {folder} (the states it was fitted on, {size / 1e6:.1f} MB, may be deleted: {folder / 'states'})")
    path = "" if folder == settings.lens_folder else f" teacher.lens_path={folder}"
    say(f"distil through it: lead-ds distill {config} teacher.lens=tuned{path} losses.layer.select=informative")


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command()(teach)
