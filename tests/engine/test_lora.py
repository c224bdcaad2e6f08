"""LoRA: its weights alone are trained, a run that is killed goes on bit for bit, the saved model is a plain one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lead_ds.config import StudentConfig, load_config
from lead_ds.engine.distributed.ranks import free_port
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder, load_student
from lead_ds.models.lora import add_lora, without_lora
from lead_ds.plan.requirements import requirements
from lead_ds.settings.train import LoraConfig
from tests.engine.jobs import losses_of
from tests.engine.running import copy_run, steps_of
from tests.helpers.forked import IMPORTED_WITH, forked, run_command
from tests.helpers.launch import launch
from tests.models.tiny_models import tiny_model, tokens_of

pytest.importorskip("peft")
JOB, STEPS = "tests.engine.jobs:distil_each", 4


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_what_is_saved_is_the_plain_model_with_its_updates(tmp_path: Path, family: str) -> None:
    config = StudentConfig(kind="dual_encoder", path=tiny_model(tmp_path, family), pooling="mean", projection=8)
    student = load_student(config, torch.float32).eval()
    names = list(student.state_dict())
    add_lora(student, LoraConfig(r=2, alpha=8))
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"behind.1.linear.weight", "behind.1.linear.bias"}
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain = load_student(config, torch.float32).eval()
    state = without_lora(student, student.state_dict())
    assert list(state) == names
    tokens = tokens_of((5, 9))
    with torch.no_grad():
        before = plain(tokens=tokens)
        plain.load_state_dict(state)
        torch.testing.assert_close(plain(tokens=tokens), student(tokens=tokens), rtol=0, atol=1e-5)
        assert not torch.allclose(before, plain(tokens=tokens), atol=1e-3)


def test_targets_are_linear_layers(tmp_path: Path) -> None:
    student = load_student(StudentConfig(kind="dual_encoder", path=tiny_model(tmp_path, "bert")), torch.float32)
    with pytest.raises(InputError, match=r"q_proj is no linear layer of .*query, key, value, dense"):
        add_lora(student, LoraConfig(targets=["query", "q_proj"]))
    add_lora(student, LoraConfig(targets=["query"], r=2))
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 2
    assert all("query.lora_" in name for name in trained)


def _sections(stage: int) -> dict[str, Any]:
    return {
        "student": {"path": "dropout"},
        "train": {
            "steps": STEPS,
            "batch_size": 2,
            "save_every": 2,
            "keep": STEPS,
            "lr": 0.01,
            "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        },
        "deepspeed": {"student": f"ds_configs/student_zero{stage}.json"},
    }


def _continued(configs: list[Path], world: int) -> None:
    """Train; what a kill after step 2 would have left goes on to the same losses and the same model."""
    losses = launch(JOB, world, configs=list(map(str, configs)))[0]
    assert all(len(told) == STEPS for told in losses), losses
    copies = [copy_run(config, f"{config.stem}-again", step=2) for config in configs]
    assert launch(JOB, world, configs=list(map(str, copies)), resume=True)[0] == losses
    tokens = tokens_of((5, 9))
    for config, copy in zip(configs, copies, strict=True):
        whole, again = (Path(yaml.safe_load(path.read_text())["output"]) for path in (config, copy))
        saved = (load_encoder(str(folder / "student"))[0](tokens=tokens) for folder in (whole, again))
        torch.testing.assert_close(*saved, rtol=0, atol=0)


def _stored(checkpoint: Path) -> tuple[int, int]:
    """Elements of an optimizer's moments, and bytes of a checkpoint."""
    found = 0
    for file in checkpoint.glob("*optim_states.pt"):
        tree = torch.load(file, weights_only=False)["optimizer_state_dict"]
        found += sum(x.numel() for name, x in _tensors(tree) if name == "exp_avg")
    return found, sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


def _tensors(tree: Any, name: str = "") -> Any:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, str(key))


def test_one_process_goes_on_exactly(configure: Callable[..., Path], tmp_path: Path) -> None:
    config = configure("lora", **_sections(1))
    _continued([config], 1)
    shape = requirements(load_config(config)).student
    moments, _ = _stored(tmp_path / "lora" / "checkpoints" / f"step-{STEPS:08d}")
    assert shape.trainable < shape.numel / 4
    assert shape.trainable <= moments < shape.trainable + 8  # padding
    base = shutil.copytree(yaml.safe_load(config.read_text())["student"]["path"], tmp_path / "other")
    save_file({name: 2 * x for name, x in load_file(base / "model.safetensors").items()}, base / "model.safetensors")
    copy = copy_run(config, "elsewhere", step=2, student={"path": str(base)})
    [told] = launch(JOB, 1, configs=[str(copy)], resume=True)[0]
    assert "files that have changed: student: " in told


@pytest.mark.slow
def test_sharded_runs_go_on_exactly(configure: Callable[..., Path]) -> None:
    _continued([configure(f"zero{stage}", **_sections(stage)) for stage in (1, 2, 3)], 2)


class Started:
    """A command on two processes, as a launcher would start them."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        everywhere = {**os.environ, **IMPORTED_WITH, **place}
        self.ranks = [
            forked(run_command, list(words), {**everywhere, "RANK": rank, "LOCAL_RANK": rank}, str(log), str(log))
            for rank in "01"
        ]

    def killed_after(self, step: int, output: Path) -> None:
        """Wait for a step, then kill both at once, as the end of their machine would."""
        deadline = time.monotonic() + 600
        while steps_of(output) < step:
            assert all(rank.exitcode is None for rank in self.ranks), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for rank in self.ranks:
            os.kill(rank.pid, signal.SIGKILL)
        assert self.ended() == [-signal.SIGKILL] * 2

    def ended(self) -> list[int]:
        """The processes' statuses."""
        for rank in self.ranks:
            rank.join(600)
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in self.ranks]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stage"), [("warmup", 1), ("warmup", 2), ("warmup", 3), ("distill", 2)])
def test_a_run_that_is_killed_goes_on_exactly(
    configure: Callable[..., Path], tmp_path: Path, command: str, stage: int
) -> None:
    """Killed by SIGKILL while it trains, behind a checkpoint, twice: the losses and the weights of a run that was not."""
    steps = 40
    sections = _sections(stage)
    sections["train"] |= {"steps": steps, "save_every": 4, "keep": 2}
    of = ["--of", "teacher"] if command == "warmup" else []
    whole, harmed = (tmp_path / name for name in ("whole", "harmed"))
    words = {folder: [command, str(configure(folder.name, **sections)), *of, "--quiet"] for folder in (whole, harmed)}
    first = Started(tmp_path / "whole.log", *words[whole])
    assert first.ended() == [0, 0], first.log.read_text()[-3000:]
    Started(tmp_path / "killed.log", *words[harmed]).killed_after(6, harmed)
    reached = steps_of(harmed)
    assert 6 <= reached < steps, "it was over"
    Started(tmp_path / "again.log", *words[harmed], "--resume").killed_after(reached + 6, harmed)
    assert reached + 6 <= steps_of(harmed) < steps, "it was over"
    last = Started(tmp_path / "last.log", *words[harmed], "--resume")
    assert last.ended() == [0, 0], last.log.read_text()[-3000:]
    assert losses_of(harmed) == losses_of(whole)
    assert len(losses_of(whole)) == steps
    product = "model" if command == "warmup" else "student"
    one, other = (load_file(folder / product / "model.safetensors") for folder in (whole, harmed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any("lora" in name for name in one)
