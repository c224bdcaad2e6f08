"""The configuration: one pydantic tree (`schema`), read from YAML with `key=value` overrides (`load`)."""

from lead_ds.config.load import load_config, save_config
from lead_ds.config.losses import (
    AttentionLoss,
    ContrastiveLoss,
    LayerLoss,
    LossesConfig,
    MarginMSELoss,
    ResponseLoss,
)
from lead_ds.config.schema import Config, StudentConfig, TeacherConfig
from lead_ds.settings.data import DataConfig
from lead_ds.settings.mining import MineSettings
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.pipeline import EvaluateStage, LensStage, Mining, PipelineConfig, TeachStage
from lead_ds.settings.train import DeepSpeedFiles, EvaluationConfig, MonitorConfig, ProfileConfig, TrainConfig

__all__ = [
    "AttentionLoss",
    "Config",
    "ContrastiveLoss",
    "DataConfig",
    "DeepSpeedFiles",
    "EvaluateStage",
    "EvaluationConfig",
    "LayerLoss",
    "LensStage",
    "LossesConfig",
    "MarginMSELoss",
    "MineSettings",
    "Mining",
    "ModelConfig",
    "MonitorConfig",
    "PipelineConfig",
    "ProfileConfig",
    "ResponseLoss",
    "StudentConfig",
    "TeachStage",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
    "save_config",
]
