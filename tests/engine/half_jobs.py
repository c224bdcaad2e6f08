"""Training in float16 where DeepSpeed would refuse it: on a CPU, which is slow at it and otherwise the same."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from lead_ds.engine.distributed import deepspeed_files
from lead_ds.engine.distributed.ranks import ranks
from tests.engine.fault_jobs import run_each


def forced() -> None:
    """Let this process train in float16."""
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed_files.has_fp16 = lambda: True  # type: ignore[assignment]


def run_each_forced(configs: list[str]) -> list[Any]:
    """`run_each` in a process that may train in float16."""
    forced()
    return run_each(configs)


def weights_after(stages: list[int], scale: int) -> list[float]:
    """A weight of 1 after one step of SGD on the loss w, by DeepSpeed in float16 with a fixed loss scale, per ZeRO stage."""
    forced()
    found = []
    with ranks():
        for stage in stages:
            model = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.ones_(model.weight)
            tree = {
                "train_micro_batch_size_per_gpu": 1,
                "fp16": {"enabled": True, "loss_scale": scale},
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            }
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=tree)[0]
            engine.backward(engine(torch.ones(1, 1).half()).float().sum())
            engine.step()
            found.append(float(next(engine.module.parameters()).detach().float().sum()))
    return found
