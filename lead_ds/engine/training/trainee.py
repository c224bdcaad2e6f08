"""What is trained, in one DeepSpeed engine: the student, the losses, and the teacher where that is co-trained."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import student_deepspeed_config, zero_stage
from lead_ds.engine.distributed.engines import begin_engine
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.step import Micro, agreed, side
from lead_ds.errors import InputError
from lead_ds.losses.objective import Captured, Objective, ObjectiveOutput
from lead_ds.losses.views import Side, Views
from lead_ds.models.dtypes import has_bfloat16
from lead_ds.models.load import DTYPES
from lead_ds.models.scorer import Scorer
from lead_ds.models.special_weights import check_trained_sharded, reach_all_experts
from lead_ds.settings.model import ModelConfig


class Trainee(nn.Module):
    """Student, losses and co-trained teacher as one module: one engine, one optimizer, one checkpoint.

    The losses run inside its forward, so that every ZeRO stage finds their weights where they are used.
    """

    def __init__(self, student: Scorer, teacher: Scorer | None = None, losses: Objective | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.losses = losses

    def forward(self, micro: Micro) -> ObjectiveOutput:
        """The objective of one micro-batch."""
        assert self.losses is not None
        longest, *others = micro.longest or (None, None)
        student, taught = agreed(answer(self.student, micro.student, micro.asked.student), longest), micro.taught
        if self.teacher is not None:
            taught = [agreed(answer(self.teacher, micro.teacher, micro.asked.teachers[0]), others[0])]
        if getattr(self.student.config, "passages", "own") == "teacher":
            [teacher] = taught
            assert teacher is not None
            student = student.asking(teacher)
        micro.scope.begin()
        cotrained, first = self.teacher is not None, taught[0] if taught else None
        views = Views(student, first, micro.scope, micro.keys, cotrained=cotrained, groups=micro.groups[0])
        more = zip(taught[1:], micro.groups[1:], strict=True)
        return self.losses([views, *(views.beside(teacher, groups) for teacher, groups in more)], micro.asked)


def answer(scorer: Scorer, batch: Any, asked: Captured) -> Side:
    """A model's answer for a micro-batch, as losses see it."""
    return side(scorer(batch, layers=asked.layers, tap_layers=asked.taps))


def student_dtype(settings: ModelConfig, device: torch.device) -> torch.dtype:
    """bf16 on CUDA that has it, else fp16; float32 on CPU; or what the configuration sets."""
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16() else torch.float16


def build_engine(trainee: Trainee, config: Config, dtype: torch.dtype, ranks: Ranks) -> Any:
    """The DeepSpeed engine that trains `trainee`."""
    tree = student_deepspeed_config(config.deepspeed.student, config.train, config.monitor, Path(config.output), dtype)
    for scorer in (trainee.student, trainee.teacher):
        if scorer is not None and config.train.gradient_checkpointing:
            scorer.gradient_checkpointing_enable()
        if scorer is not None:
            scorer.recompute = config.train.grad_cache is not None
        if scorer is not None and config.train.compile:
            scorer.compile_layers()
    if zero_stage(tree) == 3:
        check_trained_sharded(trainee)
        # DeepSpeed gathers the experts of some classes as one, and fails at their second forward pass of a step.
        tree["zero_optimization"].setdefault("leaf_module", {"classes": []})
    else:
        reach_all_experts(trainee)
    groups = parameter_groups(trainee, config)
    # DeepSpeed's own Adam would be compiled for over a minute on a CPU; torch's fused one is as good there.
    fused = ranks.device.type in ("cuda", "cpu")
    optimizer = None if "optimizer" in tree else torch.optim.AdamW(groups, fused=fused)
    if (tree.get("optimizer") or {}).get("type", "").lower() != "muon":
        _import_muon()
    try:
        engine = begin_engine(
            trainee, model_parameters=groups if optimizer is None else None, optimizer=optimizer, config=tree
        )
    except (ValidationError, AssertionError, TypeError) as error:
        # DeepSpeed's errors for a key or value that it does not know, and an optimizer's for its own.
        what = " ".join(str(error).split())[:300] or "DeepSpeed refuses it"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r}"[:300]
        given = config.deepspeed.student
        where = f"deepspeed.student: {given}" if isinstance(given, str) else "deepspeed.student"
        raise InputError(where, what, "see ds_configs/README.md for what goes there") from error
    engine.train()
    return engine


def _import_muon() -> None:
    """What DeepSpeed imports to see that an optimizer is none of its Muons, without the compiler that Muon would use: it
    takes longer to import than the rest of DeepSpeed."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:  # another version of DeepSpeed
        pass
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def parameter_groups(trainee: Trainee, config: Config) -> list[dict[str, Any]]:
    """Optimizer groups: weight decay on matrices only, and a co-trained teacher's own learning rate."""
    train = config.train
    taught = config.cotrained.lr if config.cotrained and config.cotrained.lr else train.lr
    groups = []
    for module, lr in ((trainee.student, train.lr), (trainee.teacher, taught), (trainee.losses, train.lr)):
        parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
        plain = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
        for members, decay in ((decayed, train.weight_decay), (plain, 0.0)):
            if members:
                groups.append({"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return groups


def gathered_state_dict(scorer: Scorer, ranks: Ranks) -> dict[str, torch.Tensor] | None:
    """The whole state dict on rank 0's CPU (None elsewhere), one ZeRO-3 parameter gathered at a time. Every rank calls it."""
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    for name, tensor in (*scorer.named_parameters(), *persistent_buffers(scorer)):
        sharded = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor], enabled=sharded):
            if ranks.main:
                state[name] = tensor.detach().cpu().clone()
    return state if ranks.main else None


def persistent_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's buffers that its state has, by name."""
    kept = set(module.state_dict().keys())
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]
