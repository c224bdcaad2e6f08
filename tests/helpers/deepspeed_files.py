"""A teacher's DeepSpeed configuration, filled in for a small model."""

from __future__ import annotations

from typing import Any

import torch

from lead_ds.engine.distributed.deepspeed_files import teacher_deepspeed_config


def filled_teacher(source: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    """In bf16, of a teacher 64 wide, on four processes of one machine; changes: of these."""
    given: dict[str, Any] = {"dtype": torch.bfloat16, "hidden": 64, "layer": 50_000, "shard": 70_000, "local_world": 4}
    return teacher_deepspeed_config(source, **{**given, "offload": "none", "offload_path": None, **changes})
