"""The sections of a whole run, for rooms below the configuration that composes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from lead_ds.settings.data import DataConfig
from lead_ds.settings.train import DeepSpeedFiles, EvaluationConfig, MonitorConfig, TrainConfig


class Run(Protocol):
    """What `lead_ds.config.Config` is: a run's sections, and where its teacher's tuned lens is."""

    @property
    def seed(self) -> int: ...
    @property
    def teacher(self) -> Any: ...  # a teacher's role and kind; None without one
    @property
    def student(self) -> Any: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def losses(self) -> Any: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def deepspeed(self) -> DeepSpeedFiles: ...
    @property
    def monitor(self) -> MonitorConfig: ...
    @property
    def output(self) -> str: ...
    @property
    def lens_folder(self) -> Path: ...

    def model_copy(self, *, update: dict[str, Any]) -> Any: ...
