"""Every setting of a run, its default and its bounds. Read once by `load`; plain typed values ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from lead_ds.config.losses import AnyLosses, losses_section
from lead_ds.config.models import AnyStudent, AnyTeacher
from lead_ds.config.rules import broken
from lead_ds.settings.base import BITS, PACE, Means, Place, Section, Seed
from lead_ds.settings.data import DataConfig
from lead_ds.settings.modes import refusal
from lead_ds.settings.pipeline import PipelineConfig
from lead_ds.settings.plugins import load_plugins
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

    @field_validator("profile", mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @property
    def lens_folder(self) -> Path:
        """Where the teacher's tuned lens is, or will be."""
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
