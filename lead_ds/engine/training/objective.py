"""The losses of a run, made for the models that they will compare, and the layers that they select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.config.facts import fed
from lead_ds.data.batches import Batches
from lead_ds.data.reads import ModelBatch
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.losses.loss import Losses, LossShape, ModelFacts
from lead_ds.losses.objective import Objective, Taught
from lead_ds.losses.selection import Depths, Layers
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.scorer import Scorer
from lead_ds.relevance import Features, VectorFeatures
from lead_ds.teachers.teacher import Teacher


def build_objective(
    config: Config, student: Kind, taught: Sequence[Teacher | Scorer], batches: Batches, ranks: Ranks
) -> Objective:
    """The modules of a configuration's losses, with equal weights on every rank. Every rank calls this.

    taught: the models that are learned from: frozen teachers, or the one that is trained, or none. Where a loss compares
    vectors, the models read a micro-batch first, for their width: whatever they are made of.
    Raises InputError where there are no vectors to compare, and where every weight is 0.
    """
    models = [("student", student), *(("teacher", getattr(one, "scorer", one)) for one in taught)]
    for who, model in models:
        for name in config.losses.needing("layers", "attention") if not getattr(model, "has_layers", True) else ():
            what = f"reads layers of both models, and the {who} is read at its final state alone"
            raise InputError(f"losses.{name}.weight", what, "set it to 0")
    compares, dims = config.losses.needing("features"), config.student.dims or ()
    asking = config.student.passages == "teacher"
    window = batches.window(0) if compares or asking else None
    width = student.features_width if dims else None
    if window is not None:
        width = said(student, window.student[0].to(ranks.device)).width
        if compares:
            check_width(compares[0], "student", width)
    teachers: list[Taught] = []
    for place, (teacher, settings) in enumerate(zip(taught, config.taught.values(), strict=bool(taught))):
        losses, of_vectors = fed(config, settings), None
        if window is not None and (asking or not losses.isdisjoint(compares)):
            final = final_of(teacher, window.teachers[place], ranks.device)
            of_vectors = final.width
            if asking:
                check_index(width, of_vectors if isinstance(final, VectorFeatures) else None)
            else:
                check_width(compares[0], "teacher", of_vectors)
        facts = ModelFacts(settings.kind, teacher.num_layers, of_vectors)
        teachers.append(Taught(facts, losses, getattr(settings, "weight", 1.0)))
    learner = ModelFacts(config.student.kind, student.num_layers, width, student.unit)
    shape = LossShape(learner, None, config.kernels, dims, config.student.quantize)
    torch.manual_seed(config.seed + 1)  # whatever weights were drawn before
    return agreed(ranks, lambda: Objective(config.losses, shape, teachers, config.mix.relevance, config.mix.vectors))


def check_width(loss: str, who: str, width: int | None) -> None:
    """Raise InputError where a loss compares vectors of a model that has none."""
    if width is None:
        what = f"compares vectors, and the {who} gives scores"
        raise InputError(f"losses.{loss}", what, "set its weight to 0, or name a model of vectors")


def check_index(student: int | None, teacher: int | None) -> None:
    """Raise InputError where the student's vectors cannot be compared with the teacher's passages."""
    where = "student.passages"
    if teacher is None:
        raise InputError(
            where, "the teacher gives no vectors of its passages", "name a model, or what teach --vectors kept"
        )
    if student != teacher:
        what = f"the teacher's passages have {teacher} dimensions, the student's queries {student}"
        raise InputError(where, what, f"set losses.embedding.keep: true, or student.projection: {teacher}")


@dataclass(frozen=True)
class Selected:
    """The layers that are compared: of each teacher, the losses that it feeds and the layers that can be selected."""

    of_teachers: Sequence[tuple[Losses, Depths]]

    @classmethod
    def of(
        cls, config: Config, student: Scorer, taught: Sequence[Teacher | Scorer], informative: Sequence[Sequence[int]]
    ) -> Selected:
        """taught: the models that are learned from, trained or not. informative: see `Depths`, of each."""
        return cls(
            [
                (config.losses_of(key), depths_of(student, teacher, config.seed, layers))
                # none, without losses
                for key, teacher, layers in zip(config.taught, taught, informative, strict=False)
            ]
        )

    def pairs(self, step: int) -> list[dict[str, Layers]]:
        """Of each teacher, the layers that each loss compares at a step. Raises InputError for one that does not exist."""
        return [losses.pairs(depths, step) for losses, depths in self.of_teachers]


def depths_of(student: Scorer, taught: Teacher | Scorer, seed: int, informative: Sequence[int]) -> Depths:
    """The layers of a teacher, trained or not, and of the student that can be selected."""
    return Depths(taught.num_layers, student.num_layers, seed, informative, taught.readable)


def final_of(model: Teacher | Scorer, batches: Sequence[ModelBatch], device: torch.device) -> Features:
    """The final features of some batches as one: a frozen teacher's, or those of a model in training, without dropout."""
    if isinstance(model, Teacher):
        return model.window(batches, []).final
    first, *others = (said(model, batch.to(device)) for batch in batches)
    return first.merged(others)


@torch.no_grad()
def said(scorer: Scorer, batch: Any) -> Features:
    """A scorer's final features of a batch, without dropout."""
    training = scorer.training
    final = scorer.eval()(batch).final
    scorer.train(training)
    return final
