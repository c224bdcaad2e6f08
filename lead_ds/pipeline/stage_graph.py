"""The stages of a recipe as they are added: what each needs, what decides its output, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.io.fingerprints import Fingerprints, digest
from lead_ds.pipeline.settings import existing
from lead_ds.pipeline.stage import Stage
from lead_ds.settings.documents import in_yaml

VERSION = 1  # of what decides a stage's output


@dataclass(frozen=True)
class Made:
    """What a stage leaves behind.

    product: its place in the stage's folder, which ends the command; None where the command names another. outputs: patterns
    below `root`, the stage's folder by default. resumes: where this is there, the command continues with --resume. repairs: the
    command makes again what is missing.
    """

    product: str | None
    outputs: tuple[str, ...]
    root: Path | None = None
    resumes: str | None = None
    repairs: bool = False


@dataclass(frozen=True)
class Reads:
    """The files that a stage reads: those that must be there, and those that need not."""

    files: tuple[Path, ...] = ()
    optional: tuple[Path, ...] = ()


NO_FILES = Reads()


class StageGraph:
    """Stages by name, in the order in which they can run.

    folder: where each has one of its own. data: the recipe's dataset; a stage that reads of it needs the stage `prepare`,
    where there is one.
    """

    def __init__(self, folder: Path, data: Path, fingerprints: Fingerprints) -> None:
        self.stages: dict[str, Stage] = {}
        self._folder, self._data, self._fingerprints = folder, data, fingerprints

    def files(self, *names: str, data: Path | None = None) -> tuple[Path, ...]:
        """Files of the recipe's dataset, or of `data`, by the names that they have on disk."""
        return tuple(existing((data or self._data) / name) for name in names)

    def add(
        self,
        name: str,
        command: Sequence[Any],
        made: Made,
        settings: Mapping[str, Any] | None = None,
        needs: Sequence[str] = (),
        reads: Reads = NO_FILES,
        *,
        more: Sequence[Sequence[Any]] = (),
        **facts: Any,
    ) -> str:
        """Add a stage whose command ends with the place of its product, in a folder named after what decides it.

        settings: what decides its output beside `needs` and `reads`. more: commands after the first. facts: of `Stage`.
        """
        files = (*reads.files, *reads.optional)
        needs = [need for need in needs if need]
        prepared = "prepare" in self.stages and any(self._data in file.parents for file in files)
        if prepared:
            needs = ["prepare", *needs]
        read = [file for file in files if not (prepared and self._data in file.parents)]
        decided = {
            "version": VERSION,
            **(settings or {}),
            "stages": {need: self.stages[need].digest for need in needs},
            "files": [self._fingerprints.file(file) for file in read],
        }
        key = digest(decided)
        folder = self._folder / f"{name}-{key[:10]}"
        commands = [tuple(map(str, one)) for one in (command, *more)]
        if made.product is not None:
            place = f"output={in_yaml(str(folder / made.product))}" if made.resumes else str(folder / made.product)
            # An override stands with the others, before options.
            at = next((i for i, word in enumerate(commands[0]) if i > 1 and word.startswith("--")), None)
            at = at if made.resumes else None
            head, tail = (commands[0], ()) if at is None else (commands[0][:at], commands[0][at:])
            if made.resumes:  # in place of the whole pipeline's
                head = tuple(word for word in head if not word.startswith("output="))
            commands[0] = (*head, place, *tail)
        self.stages[name] = Stage(
            name=name,
            folder=folder,
            digest=key,
            commands=tuple(commands),
            outputs=made.outputs,
            root=made.root or folder,
            needs=tuple(needs),
            deciding=decided,
            files=tuple(file for file in reads.files if file in read),
            resumes=folder / made.resumes if made.resumes else None,
            repairs=made.repairs or made.resumes is not None,
            **facts,
        )
        return name
