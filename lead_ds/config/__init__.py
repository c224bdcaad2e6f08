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
from lead_ds.config.mining import MineSettings
from lead_ds.config.pipeline import EvaluateStage, LensStage, Mining, PipelineConfig, TeachStage
from lead_ds.config.schema import (
    Config,
    DataConfig,
    DeepSpeedFiles,
    EvaluationConfig,
    ModelConfig,
    MonitorConfig,
    ProfileConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

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
