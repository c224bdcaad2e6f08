"""L_stu (and L_tch of a co-trained teacher): the negative log-likelihood of the positive passage."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.views import Views
from lead_ds.relevance import Relevance
from lead_ds.settings.base import Temperature, Weight


class ContrastiveSettings(LossSettings):
    """L_stu: negative log-likelihood of the positive."""

    weight: Weight = 1.0
    temperature: Temperature = 1.0
    teacher_temperature: Temperature | None = Field(
        None, description="of a teacher that is trained, along or by `warmup --of teacher`; null: temperature"
    )
    scope: Literal["auto", "batch", "group"] = Field(
        "auto", description="over every passage of the batch, or the query's own; auto: batch"
    )


def contrastive_loss(relevance: Relevance, target_Q: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over queries of -log softmax(logits / temperature)[positive], in nats.

    relevance: one layer, [1, Q, P]; target_Q: int64 column of each query's positive. Returns a float32 scalar.
    LEAD (arXiv 2212.05225), L_stu.
    """
    return torch.nn.functional.cross_entropy(relevance.logits[0] / temperature, target_Q)


@register
class Contrastive(Loss):
    """L = -mean_q log softmax_p(s(q, p) / temperature)[positive of q], over the batch's passages or the query's own.

    Of a teacher that is co-trained, the same with its own relevance and temperature is added (L_tch). In nats.
    Statistics: contrastive, the student's part; teacher_contrastive. LEAD, arXiv 2212.05225.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side, Views
    >>> from lead_ds.relevance import ScoreFeatures
    >>> student = Side(ScoreFeatures(torch.zeros(1, 2, 4)))  # two queries with four passages each, all alike
    >>> loss = Contrastive(Contrastive.set(), LossShape(ModelFacts("cross_encoder", layers=3)))
    >>> round(loss(Views(student, None, Scope(group_size=4)))[0].item(), 4)  # log 4
    1.3863
    """

    name, Settings, needs = "contrastive", ContrastiveSettings, frozenset({"labels"})

    def forward(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, and each model's part."""
        settings = self.settings
        own = views.student.final.grouped or settings.scope == "group"
        passages: Literal["scope", "group"] = "group" if own else "scope"
        relevance = views.relevance("student", passages=passages)
        student = contrastive_loss(relevance, views.target(passages), settings.temperature)
        statistics = {"contrastive": student.detach()}
        if not views.cotrained or views.teacher is None:
            return student, statistics
        # A model of pairs sees the query's own passages only, even where the student sees the whole batch.
        passages = "group" if own or views.teacher.final.grouped else "scope"
        temperature = settings.teacher_temperature or settings.temperature
        teacher = contrastive_loss(views.relevance("teacher", passages=passages), views.target(passages), temperature)
        return student + teacher, statistics | {"teacher_contrastive": teacher.detach()}
