"""The sections of a whole run, for rooms below the configuration that composes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lead_ds.settings.base import BITS, PACE, Means, Place, Section, Seed
from lead_ds.settings.data import DataConfig
from lead_ds.settings.pipeline import PipelineConfig
from lead_ds.settings.roles import MixConfig, TeacherRole
from lead_ds.settings.train import DeepSpeedFiles, EvaluationConfig, Impl, MonitorConfig, ProfileConfig, TrainConfig


class Run(Section):
    """A run, whatever kinds of model and losses there are: `lead_ds.config.Config` says which those may be."""

    plugins: list[Place] = Field(
        [],
        description="Python files (x.py) or modules to import first: the losses that they register can be used below",
    )
    seed: Seed = 888
    teacher: Any = None
    teachers: list[Any] = Field([])
    mix: MixConfig = MixConfig()
    student: Any
    data: DataConfig
    losses: Any
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

    @property
    def taught(self) -> dict[str, Any]:
        """The teachers' sections, by the dotted key that each has."""
        several = {f"teachers.{place}": one for place, one in enumerate(self.teachers)}
        return several if self.teacher is None else {"teacher": self.teacher, **several}

    @property
    def cotrained(self) -> TeacherRole | None:
        """The teacher that is trained along; None where every one is frozen."""
        return next((one for one in self.taught.values() if isinstance(one, TeacherRole) and one.train), None)

    def losses_of(self, key: str) -> Any:
        """The losses that the teacher at `key` feeds; every other has no weight."""
        raise NotImplementedError

    @property
    def lens_folder(self) -> Path:
        """Where the tuned lens of the only teacher is, or will be; of several, each names its own."""
        named = getattr(self.teacher, "lens_path", None)
        return Path(self.output) / "lens" if named is None else Path(named)
