"""`pipeline`: the stages of a recipe, one after the other; what is complete is passed over, what was begun is continued."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError, RunError
from lead_ds.io.files import alone
from lead_ds.io.owner import owned
from lead_ds.pipeline.process import PLAIN, Run, find_launcher, spawn
from lead_ds.pipeline.recipe import Recipe
from lead_ds.pipeline.results import collect, write_results
from lead_ds.pipeline.stage import Finding, Records, Stage, make_room

Tell = Callable[[str], None]
OTHER = "another lead-ds pipeline, or a stage of one,"
WAIT = "wait for it to end, or end it; a stage lives on where its pipeline was killed"


class Stopped(RunError):
    """The pipeline was asked to stop, and did: status 128 + the signal."""

    def __init__(self, stage: str, number: int) -> None:
        super().__init__(f"stage {stage}", f"stopped by signal {number}", "the same command continues")
        self.status = 128 + number


@dataclass(frozen=True)
class Choice:
    """Which of a recipe's stages are to run: by default all that are not complete.

    stages: only these; first, until: from and up to this one; again: made again although complete. A family's name (`search`)
    stands for its members (`search-dev`).
    """

    stages: Sequence[str] = ()
    first: str | None = None
    until: str | None = None
    again: Sequence[str] = ()

    def among(self, recipe: Recipe) -> set[str]:
        """The chosen stages of a recipe. Raises InputError for an unknown one, or where none is left."""
        order = list(recipe.stages)
        chosen = named(recipe, self.stages) if self.stages else set(order)
        if self.first is not None:
            chosen &= set(order[min(order.index(name) for name in named(recipe, [self.first])) :])
        if self.until is not None:
            chosen &= set(order[: max(order.index(name) for name in named(recipe, [self.until])) + 1])
        if not chosen:
            raise InputError("stages", "none is left between --from and --until", "see --dry-run for their order")
        return chosen


EVERY_STAGE = Choice()


@dataclass(frozen=True)
class Workshop:
    """What every stage of one call is made with: the recipe, its records, how commands are launched and what is reported.

    lock: the open file that a stage inherits, so that the recipe stays locked where the pipeline is killed.
    """

    recipe: Recipe
    records: Records
    launcher: Sequence[str]
    tell: Tell
    run: Run
    lock: int


def run_pipeline(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    choice: Choice = EVERY_STAGE,
    dry_run: bool = False,
    launcher: str | None = None,
    tell: Tell = print,
    run: Run = spawn,
) -> dict[str, Any]:
    """Run what is left to do of a recipe; its stages, and the results of every evaluation that is complete, as a plain tree.

    dry_run: report only. Raises InputError, before anything is written, where the recipe or
    the choice of stages is wrong; RunError, with what is complete intact, where a stage fails.
    """
    recipe = Recipe(path, overrides)
    launching = find_launcher(launcher or recipe.pipeline.launcher)
    chosen, anew = choice.among(recipe), named(recipe, choice.again)
    records = Records(recipe.fingerprints)
    found = look(recipe, records, anew)
    check(recipe, found, chosen)
    if not dry_run:
        check_inputs(recipe, found, chosen)
    tell(table(recipe, found, chosen, launching))
    if dry_run:
        return {"recipe": str(path), "stages": facts(recipe, records, found, launching), "results": []}
    stages_folder = recipe.output / "stages"
    # The lock lives on in a stage whose pipeline was killed; the owner is seen from other hosts too.
    with alone(stages_folder, OTHER, WAIT) as lock, owned(stages_folder, "another lead-ds pipeline"):
        workshop = Workshop(recipe, records, launching, tell, run, lock)
        for name, stage in recipe.stages.items():
            if name not in chosen:
                continue
            # Looked at again: what went before decides whether it still stands.
            finding = look(recipe, records, anew)[name]
            if finding.state != "done":
                if not recipe.unchanged():
                    raise InputError(
                        path, "was changed while the pipeline ran", "run it again: what is complete is kept"
                    )
                place = f"{list(recipe.stages).index(name) + 1}/{len(recipe.stages)}"
                work(stage, finding, workshop, place)
                anew.discard(name)
        recipe.fingerprints.save()
        found = look(recipe, records, set())
        tree: dict[str, Any] = {"recipe": str(path), "stages": facts(recipe, records, found, launching)}
        tree |= collect(recipe, {name for name, finding in found.items() if finding.state == "done"})
        if tree["student"]:
            link(recipe.output / "student", Path(tree["student"]), tell)
        tell("\n" + write_results(recipe, tree))
        tell(f"student: {tree['student'] or 'not distilled yet'}; results: {recipe.output / 'results.html'}")
        return tree


def work(stage: Stage, finding: Finding, workshop: Workshop, place: str) -> None:
    """Make a stage's output, and write that it is complete. place: which of how many, as reported."""
    records, launcher, tell = workshop.records, workshop.launcher, workshop.tell
    if finding.aside and stage.folder.exists():
        tell(f"{stage.name}: {finding.note or 'not as it was left'}: {stage.folder} is kept as {make_room(stage)}")
    commands = stage.commands_now()
    needs = {need: records.product(workshop.recipe.stages[need]) or "" for need in stage.needs}
    stage.folder.mkdir(parents=True, exist_ok=True)
    lines = [shlex.join(words(command, stage, launcher)) for command in commands]
    if finding.state == "to do":
        records.begin(stage, needs, commands=lines, started=now())
    started = time.monotonic()
    tell(f"\n[{place}] {stage.name}: {finding.state}; {stage.folder}")
    for command, line in zip(commands, lines, strict=True):
        tell(f"+ {line}")
        with stage.log.open("a", encoding="utf-8") as log:
            log.write(f"{now()} + {line}\n")
        status = workshop.run(words(command, stage, launcher), stage.log, workshop.lock)
        if status:
            raise failure(stage, status)
    seconds = round(time.monotonic() - started, 1)
    earlier = (records.read(stage) or {}).get("seconds", 0.0)
    records.finish(stage, seconds=round(earlier + seconds, 1), ended=now())
    tell(f"{stage.name}: done in {seconds:.0f} s")


def failure(stage: Stage, status: int) -> RunError:
    """What ended a stage, in one line."""
    number = -status if status < 0 else status - 128
    if number in (1, 2, 15):
        return Stopped(stage.name, number)
    ended = f"was killed by signal {number}" if status < 0 or status in (137, 139) else f"ended with status {status}"
    said = [line for line in stage.log.read_text("utf-8", "replace").splitlines() if line.startswith("error: ")]
    what = ended + (f": {said[-1].removeprefix('error: ')}" if said and status in (1, 2) else "")
    error = RunError(f"stage {stage.name}", what, f"log: {stage.log}; mend the cause, then the same command continues")
    error.status = 2 if status == 2 else 1
    return error


def words(command: Sequence[str], stage: Stage, launcher: Sequence[str]) -> list[str]:
    """A stage's command under its launcher."""
    return [*(launcher if stage.distributed else [PLAIN]), *command]


def look(recipe: Recipe, records: Records, anew: set[str]) -> dict[str, Finding]:
    """How every stage stands."""
    found: dict[str, Finding] = {}
    for name, stage in recipe.stages.items():
        if name in anew:
            found[name] = Finding("to do", "requested again", aside=True)
            continue
        products = {
            need: records.product(recipe.stages[need]) if found[need].state == "done" else None for need in stage.needs
        }
        found[name] = records.find(stage, products)
    return found


def named(recipe: Recipe, names: Sequence[str]) -> set[str]:
    """Stages by name or family. Raises InputError for an unknown one."""
    found: set[str] = set()
    for name in names:
        members = {stage for stage in recipe.stages if stage == name or stage.startswith(f"{name}-")}
        if not members:
            raise InputError(f"stage {name}", "is unknown", f"this recipe has {', '.join(recipe.stages)}")
        found |= members
    return found


def check(recipe: Recipe, found: dict[str, Finding], chosen: set[str]) -> None:
    """Raise InputError where a chosen stage needs one that is neither complete nor chosen."""
    for name in recipe.stages:
        if name not in chosen or found[name].state == "done":
            continue
        absent = [need for need in recipe.stages[name].needs if need not in chosen and found[need].state != "done"]
        if absent:
            raise InputError(f"stage {name}", f"needs {', '.join(absent)}, not complete", "choose that stage as well")


def check_inputs(recipe: Recipe, found: dict[str, Finding], chosen: set[str]) -> None:
    """Raise InputError where a stage that will run reads a file or a local model that is not there."""
    for name, stage in recipe.stages.items():
        if name not in chosen or found[name].state == "done":
            continue
        for file in stage.files:
            if not file.exists():
                raise InputError(file, "no such file", f"stage {name} reads it; data.path is {recipe.config.data.path}")
        for model in stage.models:
            local = Path(model)
            if (local.is_absolute() or model.startswith(".") or model.count("/") > 1) and not local.is_dir():
                raise InputError(
                    model, "no such folder", f"stage {name} reads a model there, or of that name on the hub"
                )


def table(recipe: Recipe, found: dict[str, Finding], chosen: set[str], launcher: Sequence[str]) -> str:
    """Stage, state and command of every stage, a line each: commands are to be copied."""
    rows = [("stage", "state", "command")]
    for name, stage in recipe.stages.items():
        state = found[name].state if name in chosen or found[name].state == "done" else "left out"
        for i, command in enumerate(stage.commands_now()):
            line = shlex.join(words(command, stage, launcher))
            rows.append((name, state, line) if i == 0 else ("", "", line))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {line}" for name, state, line in rows)


def facts(recipe: Recipe, records: Records, found: dict[str, Finding], launcher: Sequence[str]) -> list[dict[str, Any]]:
    """Every stage as a plain tree."""
    return [
        {
            "stage": name,
            "state": found[name].state,
            "commands": [shlex.join(words(command, stage, launcher)) for command in stage.commands_now()],
            "folder": str(stage.folder),
            "digest": stage.digest,
            "needs": list(stage.needs),
            "seconds": (records.read(stage) or {}).get("seconds"),
        }
        for name, stage in recipe.stages.items()
    ]


def link(place: Path, student: Path, tell: Tell) -> None:
    """Let OUTPUT/student lead to the distilled student, unless something else has that name."""
    if place.exists() and not place.is_symlink():
        return
    fresh = place.with_name(f".{place.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(student, place.parent))
        fresh.replace(place)
    except OSError as error:  # a file system without links: the folder has a name as well
        tell(f"{place} cannot be made ({error}): the student is in {student}")


def now() -> str:
    """The time, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
