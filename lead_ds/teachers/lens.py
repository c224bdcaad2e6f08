"""The tuned lens that a configuration names: where it is, whether it is this teacher's, and what it was measured to give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.io.facts import check_facts
from lead_ds.models.lens import Lens, load_lens
from lead_ds.models.load import load_text
from lead_ds.settings.roles import TeacherRole
from lead_ds.teachers.identity import teacher_facts

_FIT = "fit one: lead-ds fit-lens CONFIG"


@dataclass(frozen=True)
class FittedLens:
    """A lens, the NLL of each layer through it on groups that it was not fitted on, and what that is by chance."""

    folder: Path
    lens: Lens
    checksum: str
    nll: list[float]
    chance: float

    @property
    def facts(self) -> dict[str, Any]:
        """What ties a cache to it."""
        return {"checksum": self.checksum, "nll": self.nll, "chance": self.chance}


def lens_identity(teacher: TeacherRole, encoder: TextEncoder, seed: int) -> dict[str, Any]:
    """What a lens is fitted to: the teacher and how it reads, whatever it computes in and however its layers are read."""
    facts = teacher_facts(teacher, encoder, seed)
    settings = {name: value for name, value in facts["settings"].items() if name not in ("lens", "dtype")}
    return {**facts, "settings": settings}


def open_lens(teacher: TeacherRole, folder: Path, seed: int, encoder: TextEncoder | None = None) -> FittedLens | None:
    """The lens of a teacher, in `folder`; None where its layers are read through its own head.

    Raises InputError where there is none, it is damaged, or of another teacher or reading.
    """
    if teacher.lens == "head":
        return None
    lens, record = load_lens(folder, f"{_FIT}; or name its folder, teacher.lens_path=")
    facts = lens_identity(teacher, encoder or load_text(teacher), seed)
    check_facts(folder, "is the lens", record["facts"], facts, f"{_FIT} teacher.lens_path=ANOTHER_FOLDER")
    nll = [row["after"]["nll"] for row in record["layers"]]
    return FittedLens(folder, lens, record["checksum"], nll, record["chance"]["nll"])
