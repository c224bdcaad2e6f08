"""Every key of ds_configs/ is explained in its README, the README explains no other, and every "auto" is filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import (
    read_deepspeed_config,
    student_deepspeed_config,
)
from tests.helpers.deepspeed_files import filled_teacher

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
README = (FOLDER / "README.md").read_text("utf-8")


def keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from keys(value)


def test_every_key_is_explained_and_no_other() -> None:
    used = {key for file in FILES for key in keys(json.loads(file.read_text()))}
    section = README.split("## Every key")[1].split("## What does not work")[0]
    explained = set(re.findall(r"^\| `(\w+)` \|", section, re.M)) | set(re.findall(r"^### `(\w+)`", section, re.M))
    assert used == explained
    assert len(FILES) == 8
    for file in FILES:
        assert f"`{file.name}`" in README


def test_every_auto_is_told_and_filled_in() -> None:
    auto = {
        key
        for file in FILES
        for key in keys(json.loads(file.read_text()))
        if re.search(rf'"{key}": "auto"', file.read_text())
    }
    told = README.split('| key | "auto" becomes |')[1].split("\n\n")[0]
    assert auto == set(re.findall(r"^\| `(\w+)` \|", told, re.M))


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("teacher")], ids=lambda f: f.name)
def test_teacher_configuration_is_complete(file: Path) -> None:
    filled = filled_teacher(file.name, offload_path="/local/nvme")
    assert "auto" not in json.dumps(filled)
    zero = filled["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == 12 * 64 * 64
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["stage3_max_live_parameters"] == 100_000
    assert zero["memory_efficient_linear"] is False
    assert filled["bf16"]["enabled"]
    if "hpz" in file.name:
        assert zero["zero_hpz_partition_size"] == 4
    if "nvme" in file.name:
        assert zero["offload_param"]["nvme_path"] == "/local/nvme"
        assert zero["offload_param"]["buffer_size"] == 70_000


def test_a_disk_named_by_the_run_alone_gets_buffers_of_the_teachers_size() -> None:
    filled = filled_teacher("teacher_zero3.json", offload="nvme", offload_path="/local/nvme")
    offload = filled["zero_optimization"]["offload_param"]
    assert (offload["device"], offload["nvme_path"], offload["buffer_size"]) == ("nvme", "/local/nvme", 70_000)


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("student")], ids=lambda f: f.name)
def test_student_configuration_takes_the_runs_settings(file: Path) -> None:
    tree = {
        "student": {"path": "x"},
        "data": {"path": "x"},
        "losses": {"response": {"weight": 0}, "layer": {"weight": 0}},
        "train": {"batch_size": 3, "accumulation": 2, "clip": 1.5},
        "deepspeed": {"student": file.name},
    }
    config = Config.model_validate(tree)
    output = Path(config.output)
    filled = student_deepspeed_config(config.deepspeed.student, config.train, config.monitor, output, torch.bfloat16)
    assert filled["zero_optimization"]["stage"] == int(file.stem[-1])
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (3, 2)
    assert filled["gradient_clipping"] == 1.5
    assert filled["bf16"]["enabled"]
    assert read_deepspeed_config(file.name)["zero_optimization"] == filled["zero_optimization"]
