"""The first lines of a run: its models, how they read texts, and its kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.config.facts import fed, span_of
from lead_ds.data.batches import Batches
from lead_ds.data.groups.group import Groups
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.kernels.dispatch import probe_seconds, resolve
from lead_ds.models.as_read import reading_line, sample
from lead_ds.settings.roles import Span
from lead_ds.settings.train import Impl
from lead_ds.teachers.teacher import Teacher


def kernels_used(kernels: Impl, ranks: Ranks) -> str:
    """triton or torch: what the setting `kernels` means on this device."""
    try:
        return resolve(kernels, torch.empty(0, device=ranks.device), kernel="layer_kl")
    except ValueError as error:
        raise InputError("kernels", str(error), "set kernels=auto, or torch") from None


def readings(groups: Groups, batches: Batches, student: Any, teachers: Sequence[Any]) -> Iterator[str]:
    """How student and teachers read texts, a line each, with what is cut of a sample of the training groups'."""
    texts = sample(groups)
    taught = zip(batches.teachers.items(), teachers, strict=True)
    for role, scorer, reads in (
        ("student", student, batches.student),
        *((key, one, reads) for (key, reads), one in taught),
    ):
        if scorer is not None and reads.encoder is not None:
            yield f"{role} {reading_line(scorer, reads.encoder, *texts)}"


def describe(config: Config, ranks: Ranks, student: Any, teachers: Mapping[str, Teacher], groups: int) -> str:
    """The first lines of a run."""
    depth = f"{student.num_layers} layers, {student.width} wide"
    kernels = kernels_used(config.kernels, ranks)
    tried = f", tried in {probe_seconds(ranks.device):.1f} s" if kernels == "triton" else ""
    run = f"{groups} groups; {ranks.world} process(es); {kernels} kernels{tried}"
    role = "student" if config.taught else config.student.kind.replace("_", " ")
    lines = [f"{role} {config.student.path}: {depth}; {run}"]
    several = config.teacher is None
    for key, teacher in teachers.items():
        feeds = f"; feeds {', '.join(sorted(fed(config, config.taught[key])))}" if several else ""
        span = span_of(config.taught[key])
        when = "" if span == Span() else f" at steps {span.after + 1} to {span.until or config.train.steps}"
        lines.append(teacher.describe() + feeds + when)
    return "\n".join(lines)
