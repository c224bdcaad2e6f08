"""What a DeepSpeed file says is used or refused: DeepSpeed itself drops keys that it does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import (
    read_deepspeed_config,
    student_deepspeed_config,
)
from lead_ds.errors import InputError
from tests.helpers.deepspeed_files import filled_teacher


def filled(tree: dict[str, Any], dtype: torch.dtype = torch.float32, **monitor: bool) -> dict[str, Any]:
    """The student's DeepSpeed configuration of a run of batches of 4."""
    config = Config.model_validate(
        {
            "student": {"path": "x"},
            "data": {"path": "x"},
            "losses": {"response": {"weight": 0}, "layer": {"weight": 0}},
            "train": {"batch_size": 4, "clip": 1.5},
            "monitor": {"tensorboard": False, "csv": False, **monitor},
            "deepspeed": {"student": tree},
        }
    )
    return student_deepspeed_config(config.deepspeed.student, config.train, config.monitor, Path("runs/x"), dtype)


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"zero_optimisation": {"stage": 2}}, "'zero_optimisation' has no effect in a run .did you mean 'zero_optim"),
        ({"optimizer": {"type": "AdamW", "param": {"eps": 1}}}, "optimizer: 'param' has no effect"),
        ({"elasticity": {}}, "'elasticity' has no effect"),
        (
            {"flops_profiler": {"enabled": True}},
            "has a flops_profiler, which is not used .take it out, and set profile=",
        ),
        ({"activation_checkpointing": {}}, "train.gradient_checkpointing=true"),
        ({"steps_per_print": "x"}, "steps_per_print is 'x' .write it as int"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True"),
    ],
)
def test_a_key_without_effect_is_refused(tree: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_deepspeed_config(tree)


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"train_micro_batch_size_per_gpu": 77}, "has train_micro_batch_size_per_gpu 77, and train.batch_size is 4"),
        ({"gradient_accumulation_steps": 2}, "train.accumulation is 1"),
        ({"gradient_clipping": 1.0}, "has gradient_clipping 1.0, and train.clip is 1.5"),
        ({"bf16": {"enabled": True}}, "has bf16, and the model is read in float32"),
        ({"csv_monitor": {"enabled": True}}, "has csv_monitor, and so has the run"),
    ],
)
def test_what_the_run_would_override_is_refused(tree: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        filled(tree, csv=True)


def test_what_agrees_with_the_run_is_welcome() -> None:
    agreed = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.5, "bf16": {"enabled": False}}
    tree = filled({**agreed, "csv_monitor": {"enabled": True, "output_path": "there"}})
    assert (tree["train_micro_batch_size_per_gpu"], tree["gradient_clipping"]) == (4, 1.5)
    assert tree["csv_monitor"]["output_path"] == "there"
    assert (
        filled({"train_batch_size": 77})["train_batch_size"] == 77
    )  # compared by DeepSpeed, which knows the processes
    assert filled({"bf16": {"enabled": True}}, torch.bfloat16)["bf16"]["enabled"]


@pytest.mark.parametrize("key", ["optimizer", "train_batch_size", "gradient_clipping"])
def test_a_frozen_teacher_is_not_trained(key: str) -> None:
    tree = {"zero_optimization": {"stage": 3}, key: {"type": "AdamW"} if key == "optimizer" else 4}
    with pytest.raises(InputError, match=f"has {key}, and a frozen teacher is not trained"):
        filled_teacher(tree, dtype=torch.float32)
