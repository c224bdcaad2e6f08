"""The configuration: one pydantic tree (`schema`), read from YAML with `key=value` overrides (`load`)."""

from lead_ds.config.load import load_config, save_config
from lead_ds.config.losses import LossesConfig, losses_section
from lead_ds.config.models import StudentConfig, TeacherConfig
from lead_ds.config.schema import Config
from lead_ds.settings.data import DataConfig
from lead_ds.settings.mining import MineSettings
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.pipeline import EvaluateStage, LensStage, Mining, PipelineConfig, TeachStage
from lead_ds.settings.train import DeepSpeedFiles, EvaluationConfig, MonitorConfig, ProfileConfig, TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "DeepSpeedFiles",
    "EvaluateStage",
    "EvaluationConfig",
    "LensStage",
    "LossesConfig",
    "MineSettings",
    "Mining",
    "ModelConfig",
    "MonitorConfig",
    "PipelineConfig",
    "ProfileConfig",
    "StudentConfig",
    "TeachStage",
    "TeacherConfig",
    "TrainConfig",
    "load_config",
    "losses_section",
    "save_config",
]
