"""The losses of a run, made for the models that they will compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.data.batches import Batches
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.losses.loss import LossShape, ModelFacts
from lead_ds.losses.objective import Objective
from lead_ds.losses.selection import Depths
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.scorer import Scorer
from lead_ds.relevance import Features
from lead_ds.teachers.teacher import Teacher


def build_objective(
    config: Config, student: Kind, cotrained: Scorer | None, teacher: Teacher | None, batches: Batches, ranks: Ranks
) -> Objective:
    """The modules of a configuration's losses, with equal weights on every rank. Every rank calls this.

    Where a loss compares vectors, both models read a micro-batch first, for their width: whatever they are made of.
    Raises InputError where there are no vectors to compare, and where every weight is 0.
    """
    compares, dims = config.losses.needing("features"), config.student.dims or ()
    widths: dict[str, int | None] = {"student": None, "teacher": None}
    if dims:
        widths["student"] = student.features_width
    if compares:
        window = batches.window(0)
        widths["student"] = said(student, window.student[0].to(ranks.device)).width
        if cotrained is not None:
            widths["teacher"] = said(cotrained, window.teacher[0].to(ranks.device)).width
        elif teacher is not None:
            widths["teacher"] = teacher.window(window.teacher, []).final.width
        for who, width in widths.items():
            if width is None:
                what = f"compares vectors, and the {who} gives scores"
                raise InputError(f"losses.{compares[0]}", what, "set its weight to 0, or name a model of vectors")
    taught = cotrained if cotrained is not None else teacher
    facts = None
    if taught is not None and config.teacher is not None:
        facts = ModelFacts(config.teacher.kind, taught.num_layers, widths["teacher"])
    learner = ModelFacts(config.student.kind, student.num_layers, widths["student"], student.unit)
    shape = LossShape(learner, facts, config.kernels, dims)
    torch.manual_seed(config.seed + 1)  # whatever weights were drawn before
    return agreed(ranks, lambda: Objective(config.losses, shape))


def depths_of(config: Config, student: Scorer, taught: Teacher | Scorer | None, informative: Sequence[int]) -> Depths:
    """The layers of both models that can be selected; taught: the model that is learned from, trained or not."""
    depth = taught.num_layers if taught is not None else 0
    readable = taught.readable if isinstance(taught, Teacher) else list(range(depth))
    return Depths(depth, student.num_layers, config.seed, informative, readable)


@torch.no_grad()
def said(scorer: Scorer, batch: Any) -> Features:
    """A scorer's final features of a batch, without dropout."""
    training = scorer.training
    final = scorer.eval()(batch).final
    scorer.train(training)
    return final
