"""A stage: the commands that make it, what decides its output, and the record of it on disk.

A stage's folder is named after a digest of what decides its output, so that a changed configuration has another folder.
Old and new never mix, and what was made before is found again when the change is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lead_ds.errors import RunError
from lead_ds.io.files import write_json
from lead_ds.io.fingerprints import ABSENT, Fingerprints, digest
from lead_ds.io.json_text import parse_json

RECORD, LOG = "stage.json", "log.txt"
State = Literal["done", "to resume", "to do"]


@dataclass(frozen=True)
class Stage:
    """One step of the recipe.

    commands: arguments of `lead-ds`, one after the other. needs: stages whose output it reads. deciding: settings and
    checksums of inputs that decide the output, beside those stages. outputs: patterns below `root`. files: that must be
    there before it starts. resumes: where this is there, the command continues with --resume. repairs: the command
    makes again what is missing of its output.
    """

    name: str
    folder: Path
    digest: str
    commands: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    root: Path
    needs: tuple[str, ...] = ()
    deciding: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    models: tuple[str, ...] = ()
    distributed: bool = False
    resumes: Path | None = None
    repairs: bool = False

    @property
    def log(self) -> Path:
        """What its commands printed."""
        return self.folder / LOG

    def commands_now(self) -> list[list[str]]:
        """The commands as they are to be given now: with --resume where a run was begun."""
        resume = ["--resume"] if self.resumes is not None and self.resumes.exists() else []
        return [[*command, *resume] for command in self.commands]


@dataclass(frozen=True)
class Finding:
    """How a stage stands: its state, what else there is to report, and whether its folder must make room first."""

    state: State
    note: str = ""
    aside: bool = False


class Records:
    """The records of stages: begun, finished, with which inputs, giving which files."""

    def __init__(self, fingerprints: Fingerprints) -> None:
        self._fingerprints = fingerprints

    def read(self, stage: Stage) -> dict[str, Any] | None:
        """A stage's record; None where it was never begun."""
        try:
            record = parse_json((stage.folder / RECORD).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and isinstance(record.get("needs"), dict)
        if whole and record.get("finished"):
            whole = isinstance(record.get("outputs"), dict)
        return record if whole else None

    def begin(self, stage: Stage, needs: Mapping[str, str], **facts: Any) -> None:
        """Write that a stage was begun with these outputs of the stages that it needs."""
        record = {
            "stage": stage.name,
            "digest": stage.digest,
            "deciding": stage.deciding,
            "needs": dict(needs),
            **facts,
        }
        write_json(stage.folder / RECORD, {**record, "finished": False})

    def finish(self, stage: Stage, **facts: Any) -> None:
        """Write that a stage is complete, with checksums of its output. Raises RunError where it left nothing."""
        outputs = self._outputs(stage)
        missing = [pattern for pattern in stage.outputs if not any(stage.root.glob(pattern))]
        if missing:
            what = f"its command ended well and left no {', '.join(missing)}"
            raise RunError(f"stage {stage.name}", what, f"see {stage.log}")
        record = self.read(stage) or {}
        write_json(stage.folder / RECORD, {**record, **facts, "finished": True, "outputs": outputs})
        self._fingerprints.save()

    def product(self, stage: Stage) -> str | None:
        """A checksum of a finished stage's output as it was recorded; None where it is not finished."""
        record = self.read(stage)
        return digest(record["outputs"]) if record and record.get("finished") else None

    def find(self, stage: Stage, needs: Mapping[str, str | None]) -> Finding:
        """How a stage stands, given the outputs of the stages that it needs; None: that one is not done."""
        record = self.read(stage)
        if record is None:
            return Finding("to do", aside=stage.folder.exists())
        if None in needs.values():
            return Finding("to do")
        changed = sorted(name for name, value in needs.items() if record["needs"].get(name) != value)
        if changed:
            return Finding("to do", f"{', '.join(changed)} was made again since", aside=True)
        if not record.get("finished"):
            return Finding("to resume")
        now = {name: self._fingerprints.file(stage.root / name) for name in record["outputs"]}
        lost = [name for name, value in now.items() if value == ABSENT]
        other = [name for name, value in now.items() if value not in (ABSENT, record["outputs"][name])]
        if other:
            return Finding("to do", f"{other[0]} was changed since it was made", aside=True)
        if lost:
            note = f"{lost[0]} is missing"
            return Finding("to resume", note) if stage.repairs else Finding("to do", note, aside=True)
        return Finding("done")

    def _outputs(self, stage: Stage) -> dict[str, str]:
        files = {file for pattern in stage.outputs for file in stage.root.glob(pattern) if file.is_file()}
        return {file.relative_to(stage.root).as_posix(): self._fingerprints.file(file) for file in sorted(files)}


def make_room(stage: Stage) -> Path:
    """Rename a stage's folder, so that nothing of it mixes with what is made now; the new name."""
    number = 1
    while (aside := stage.folder.with_name(f"{stage.folder.name}.old-{number}")).exists():
        number += 1
    try:
        stage.folder.rename(aside)
    except OSError as error:
        raise RunError(stage.folder, f"cannot be renamed: {error}", "move it away yourself") from None
    return aside
