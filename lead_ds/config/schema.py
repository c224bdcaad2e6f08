"""Every setting of a run, its default and its bounds. Read once by `load`; plain typed values ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from lead_ds.config.losses import AnyLosses, LossesConfig, losses_section
from lead_ds.config.models import AnyStudent, AnyTeacher, OneTeacher, TeacherConfig
from lead_ds.config.rules import broken, fed, span_of
from lead_ds.errors import InputError
from lead_ds.settings.base import BITS, PACE, Means, Place, Section, Seed
from lead_ds.settings.data import DataConfig
from lead_ds.settings.modes import refusal
from lead_ds.settings.pipeline import PipelineConfig
from lead_ds.settings.plugins import load_plugins
from lead_ds.settings.roles import MixConfig, Share, Span, TeacherRole
from lead_ds.settings.train import (
    DeepSpeedFiles,
    EvaluationConfig,
    Impl,
    MonitorConfig,
    ProfileConfig,
    TrainConfig,
)


class Config(Section):
    """A whole run: see `ds_configs/recipes/` for complete examples."""

    plugins: list[Place] = Field(
        [],
        description="Python files (x.py) or modules to import first: the losses that they register can be used below",
    )
    seed: Seed = 888
    teacher: AnyTeacher | None = None
    teachers: list[OneTeacher] = Field(
        [], description="several, in place of teacher: each its section, with weight and the losses that it feeds"
    )
    mix: MixConfig = MixConfig()
    student: AnyStudent
    data: DataConfig
    losses: AnyLosses = Field(default_factory=lambda: losses_section()())
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: DeepSpeedFiles = DeepSpeedFiles()
    monitor: Annotated[MonitorConfig, PACE] = MonitorConfig()
    profile: Annotated[ProfileConfig | None, PACE] = Field(
        None, description="true, or the section: a table and a trace of some steps"
    )
    kernels: Annotated[Impl, BITS] = Field(
        "auto", description="triton, torch (chunked, no CUDA needed), or auto by device"
    )
    output: Annotated[Place, Means("place", shared=True)] = "runs/lead"
    pipeline: Annotated[PipelineConfig | None, PACE] = Field(
        None, description="read by `lead-ds pipeline` alone; null: its defaults"
    )

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

    @property
    def taught(self) -> dict[str, Any]:
        """The teachers' sections, by the dotted key that each has."""
        several = {f"teachers.{place}": one for place, one in enumerate(self.teachers)}
        return several if self.teacher is None else {"teacher": self.teacher, **several}

    @property
    def cotrained(self) -> TeacherRole | None:
        """The teacher that is trained along; None where every one is frozen."""
        return next((one for one in self.taught.values() if isinstance(one, TeacherRole) and one.train), None)

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
        """The losses that the teacher at `key` feeds; every other has no weight."""
        return self.losses.only(fed(self, self.taught[key]))

    @property
    def lens_folder(self) -> Path:
        """Where the tuned lens of the only teacher is, or will be; of several, each names its own."""
        named = getattr(self.teacher, "lens_path", None)
        return Path(self.output) / "lens" if named is None else Path(named)

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
