"""What the engine's tests run on several processes. Each job calls the real thing and returns what it saw, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lead_ds.config import load_config
from lead_ds.data.batches import Batches
from lead_ds.data.groups import open_groups
from lead_ds.data.tokens import TextEncoder
from lead_ds.engine.distill import distill
from lead_ds.engine.ranks import ranks
from lead_ds.engine.teacher import build_teacher, resident_parameters
from lead_ds.errors import LeadError
from lead_ds.relevance import Features, ScoreFeatures, TokenFeatures


def losses_of(run: Path) -> list[float]:
    """The loss of every step of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def distil_each(configs: list[str]) -> list[Any]:
    """Distil every configuration in turn in one group of processes: the losses, or the error that ended it."""
    results: list[Any] = []
    with ranks():
        for path in configs:
            config = load_config(path)
            try:
                distill(config, quiet=True)
                results.append(losses_of(Path(config.output)))
            except LeadError as error:
                results.append(str(error))
    return results


def sharded_teachers(configs: list[str], forwards: int) -> list[dict[str, Any]]:
    """Of each configuration's teacher: its features sharded and replicated compared, and what it holds in memory."""
    found = []
    with ranks() as here:
        for path in configs:
            config = load_config(path)
            assert config.teacher is not None
            teacher_text = TextEncoder.from_config(config.teacher)
            student_text = TextEncoder.from_config(config.student)
            groups = open_groups(config.data)
            batches = Batches(groups, student_text, teacher_text, config, rank=here.rank, world=here.world)
            window = batches.window(0)
            answers = {}
            for placement in ("replicate", "zero3"):
                placed = config.model_copy(
                    update={"teacher": config.teacher.model_copy(update={"placement": placement})}
                )
                teacher = build_teacher(placed, here)
                layers = list(range(teacher.scorer.num_layers))
                view = teacher.window(window.teacher, layers)
                answers[placement] = [*tensors(view.final), *tensors(view.layers)]
            held, whole = teacher.parameter_bytes()
            memory = []
            for _ in range(forwards):
                teacher.window(window.teacher, layers)
                memory.append(resident_bytes())
            resident, persistent = resident_parameters(teacher.scorer)
            found.append(
                {
                    "equal": [torch.equal(a, b) for a, b in zip(answers["replicate"], answers["zero3"], strict=True)],
                    "shapes": [list(a.shape) for a in answers["zero3"]],
                    "dtype": str(next(teacher.scorer.parameters()).dtype),
                    "held": held,
                    "whole": whole,
                    "resident": resident,
                    "persistent": persistent,
                    "memory": memory,
                }
            )
    return found


def tensors(features: Features | None) -> list[torch.Tensor]:
    """The tensors of features."""
    assert features is not None
    if isinstance(features, ScoreFeatures):
        return [features.s_KQN]
    if isinstance(features, TokenFeatures):
        return [features.q_KQLD, features.p_KPLD]
    return [features.q_KQD, features.p_KPD]


def resident_bytes() -> int:
    """This process's resident set."""
    import psutil

    return int(psutil.Process().memory_info().rss)
