"""Every setting of a run, its default and its bounds. Read once by `load`; plain typed values ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from lead_ds.config.facts import fed, span_of
from lead_ds.config.losses import AnyLosses, LossesConfig, losses_section
from lead_ds.config.models import AnyStudent, AnyTeacher, OneTeacher, TeacherConfig
from lead_ds.config.rules import broken
from lead_ds.errors import InputError
from lead_ds.settings.modes import refusal
from lead_ds.settings.plugins import load_plugins
from lead_ds.settings.roles import MixConfig, Share, Span
from lead_ds.settings.run import Run


class Config(Run):
    """A whole run: see `ds_configs/recipes/` for complete examples."""

    teacher: AnyTeacher | None = None
    teachers: list[OneTeacher] = Field(
        [], description="several, in place of teacher: each its section, with weight and the losses that it feeds"
    )
    student: AnyStudent
    losses: AnyLosses = Field(default_factory=lambda: losses_section()())

    @model_validator(mode="before")
    @classmethod
    def _plugins(cls, tree: Any) -> Any:
        names = tree.get("plugins") if isinstance(tree, dict) else None
        if isinstance(names, list):
            load_plugins(name for name in names if isinstance(name, str))
        return tree

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        return {"sets": value} if isinstance(value, list) else value

    @field_validator("profile", mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    def spans(self) -> dict[str, Span]:
        """The steps at which each teacher teaches, by its key."""
        return {key: span_of(one) for key, one in self.taught.items()}

    def alone(self, place: int | None) -> Config:
        """The run with one of its several teachers, for what reads one. Raises InputError where it is not said which."""
        if self.teacher is not None or not self.teachers:
            if place is None:
                return self
            raise InputError(
                "--teacher", "chooses among teachers, and the configuration names no several", "leave it out"
            )
        if place is None or not 0 <= place < len(self.teachers):
            raise InputError("teachers", "are several", f"say which: --teacher 0 to {len(self.teachers) - 1}")
        section = self.teachers[place].model_dump(exclude={*Share.model_fields}, exclude_unset=True)
        chosen = TeacherConfig.read(section)
        return self.model_copy(update={"teacher": chosen, "teachers": [], "mix": MixConfig()})

    def losses_of(self, key: str) -> LossesConfig:
        return self.losses.only(fed(self, self.taught[key]))

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        if not value or Path(value).resolve() == Path(value).resolve().parent:
            raise ValueError("must name a folder")
        return value

    @model_validator(mode="after")
    def _check(self) -> Config:
        if found := broken(self):
            raise refusal("Config", found.key, None, found.what, found.remedy)
        return self
