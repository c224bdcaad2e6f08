"""Commands that run the frozen teacher once: teach, so that many distillations need not, and fit-lens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from lead_ds.cli import options
from lead_ds.cli.training import say
from lead_ds.errors import InputError

if TYPE_CHECKING:
    from lead_ds.config import Config


ONE = typer.Option(None, "--teacher", min=0, help="Which one, where the configuration names several: 0 is the first.")


class TeachCommand(TyperCommand):
    """`teach`, which fitted lenses before that was a command of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise InputError for --fit-lens, whatever options of it follow."""
        if "--fit-lens" in args:
            remedy = "lead-ds fit-lens CONFIG, with --groups for --lens-groups and so on"
            raise InputError("teach --fit-lens", "is a command of its own now", remedy)
        return super().parse_args(ctx, args)


def teach(
    config: Path = options.CONFIG,
    overrides: list[str] | None = options.OVERRIDES,
    out: Path | None = typer.Option(
        None, "--out", help="Where the cache goes; default: OUTPUT/teacher_cache, or OUTPUT/teacher_vectors."
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
        help="Of a dual encoder, keep vectors of every query and passage. Of the final layer and these: 9,10,11 or "
        "last:3, all, final (no other), auto (those that losses.layer reads).",
    ),
    stored: str | None = typer.Option(
        None,
        "--stored",
        metavar="DTYPE",
        help="Of --vectors: float16 (default), or float32, which loses nothing and takes twice the space.",
    ),
    teacher: int | None = ONE,
    shard_groups: int | None = typer.Option(None, "--shard-groups", min=1, help="Groups of a file; default: by kind."),
    shard_texts: int | None = typer.Option(
        None, "--shard-texts", min=1, help="Of --vectors: texts of a file; default: 4096, or fewer for many processes."
    ),
    quiet: bool = options.QUIET,
) -> None:
    """Write the teacher's relevance of every training group, from every layer, to a cache; `distill` then needs no teacher.

    One process:    lead-ds teach run.yaml --out cache

    Eight GPUs:     deepspeed --num_gpus 8 --module lead_ds teach run.yaml --out cache

    Then:           lead-ds distill run.yaml teacher.kind=cached teacher.path=cache

    Holds every positive and negative that a group lists, for any seed. Run it again after a kill to finish.

    Such a cache compares a query with its own passages. A dual encoder compares it with every passage of the batch. So
    does a cache of its vectors, which is larger: each text once, 2 bytes x width x (layers + 1). Texts alone have no
    other. It takes any
    losses.layer that reads no other layers, any losses and any teacher.scale:

    lead-ds teach run.yaml --vectors last:3 --out vectors

    lead-ds distill run.yaml teacher.kind=cached teacher.path=vectors losses.layer.select=last losses.layer.k=3

    Of several teachers, each has a cache of its own: --teacher 0, and teachers.0.kind=cached teachers.0.path=cache.

    Of a served teacher, every answer that training may need is asked for and kept; `distill` then asks nothing.
    """
    from lead_ds.config import load_config
    from lead_ds.report.lens import layer_table
    from lead_ds.teachers.teach import teach as run

    settings, key = one_of(load_config(config, overrides or []), teacher)
    if settings.teacher is not None and settings.teacher.kind == "served":
        from lead_ds.teachers.served_ahead import ask_ahead

        if any(given is not None for given in (out, vectors, stored, shard_groups, shard_texts)):
            raise typer.BadParameter(
                "a served teacher's answers go to teacher.answers as they are: --epochs alone is read"
            )
        count, place = ask_ahead(settings, epochs, quiet)
        say(f"{count} answers are kept in {place}: distil with the same configuration")
        return
    if (shard_groups if vectors is not None else shard_texts) is not None:
        raise typer.BadParameter("--shard-texts goes with --vectors, --shard-groups without")
    if stored not in (None, "float16", "float32") or (stored and vectors is None):
        raise typer.BadParameter("--stored is float16 or float32, and goes with --vectors")
    name = "teacher_cache" if vectors is None else "teacher_vectors"
    folder = out or Path(settings.output) / (name if teacher is None else f"{name}_{teacher}")
    how: dict[str, Any] = {"vectors": vectors, "epochs": epochs, "shard_size": shard_groups or shard_texts}
    how |= {"stored": stored} if stored else {}
    cache = run(settings, folder, command=["lead-ds", *sys.argv[1:]], quiet=quiet, **how)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if "measured" in cache.manifest:
        say(layer_table(cache.manifest["measured"]) + "\n")
    what = "groups" if "measured" in cache.manifest else "texts"
    say(f"{len(cache)} {what}, {cache.held()}, {size / 1e6:.1f} MB: {folder}")
    say(f"distil from it: lead-ds distill {config} {key}.kind=cached {key}.path={folder}")


def fit_lens(
    config: Path = options.CONFIG,
    overrides: list[str] | None = options.OVERRIDES,
    out: Path | None = typer.Option(
        None, "--out", help="Where the lens goes; default: teacher.lens_path, else OUTPUT/lens."
    ),
    groups: int | None = typer.Option(
        None, "--groups", min=1, help="Training groups to read, drawn by the seed; default: 2000."
    ),
    held_out: float | None = typer.Option(
        None, "--held-out", help="Part of them to stop by, and as much again to report on; default: 0.1."
    ),
    steps: int | None = typer.Option(None, "--steps", min=1, help="Steps of Adam; default: 400."),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate; default: 0.003."),
    rank: int | None = typer.Option(None, "--rank", min=1, help="Rank of a dual encoder's maps; default: 64."),
    target: str | None = typer.Option(
        None, "--target", help="labels, or final: the teacher's own final distribution; default: labels."
    ),
    teacher: int | None = ONE,
    quiet: bool = options.QUIET,
) -> None:
    """Fit the teacher's tuned lens: a small read-out of its own for each layer, with the teacher frozen.

    A teacher's lower layers know more than they can say through its head. Fit the lens on some training groups; then teach,
    or distil, through it:

    lead-ds fit-lens run.yaml

    lead-ds distill run.yaml teacher.lens=tuned losses.layer.select=informative

    Run it again after a kill to finish.
    """
    from lead_ds.config import load_config
    from lead_ds.report.lens import lens_table
    from lead_ds.teachers.fit_lens import fit_lens as run
    from lead_ds.teachers.fit_lens import fit_settings

    settings, key = one_of(load_config(config, overrides or []), teacher)
    folder = out or settings.lens_folder
    asked = {"groups": groups, "held_out": held_out, "steps": steps, "lr": lr, "rank": rank, "target": target}
    fit = fit_settings({name: value for name, value in asked.items() if value is not None})
    record = run(settings, folder, fit, command=["lead-ds", *sys.argv[1:]], quiet=quiet)
    size = sum(file.stat().st_size for file in (folder / "states").glob("*"))
    say(lens_table(record))
    say(f"\nlens: {folder} (the states it was fitted on, {size / 1e6:.1f} MB, may be deleted: {folder / 'states'})")
    path = "" if folder == settings.lens_folder else f" {key}.lens_path={folder}"
    say(f"distil through it: lead-ds distill {config} {key}.lens=tuned{path} losses.layer.select=informative")


def one_of(config: Config, place: int | None) -> tuple[Config, str]:
    """The configuration with one teacher, and the key that this one has in the file."""
    return config.alone(place), "teacher" if place is None else f"teachers.{place}"


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command(cls=TeachCommand)(teach)
    app.command("fit-lens")(fit_lens)
