"""Labels with a focus on hard examples: queries whose positive is found already count less."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.views import Views
from lead_ds.relevance import Relevance
from lead_ds.settings.base import Temperature


class FocalSettings(LossSettings):
    """Negative log-likelihood of the positive, queries weighted by how unlikely it is."""

    temperature: Temperature = 1.0
    gamma: float = Field(0.5, ge=0, allow_inf_nan=False, description="0: every query counts alike")
    scope: Literal["auto", "batch", "group"] = Field(
        "auto", description="over every passage of the batch, or the query's own; auto: batch"
    )


def focal_loss(relevance: Relevance, target_Q: Tensor, temperature: float = 1.0, gamma: float = 0.5) -> Tensor:
    """Mean over queries of (1 - p)^gamma * -log p, p = softmax(logits / temperature)[positive], in nats.

    relevance: one layer, [1, Q, P]; target_Q: int64 column of each query's positive. Returns a float32 scalar. The weight
    carries no gradient. Lin et al., Focal Loss, arXiv 1708.02002; of embedders: KaLM-Embedding-V2, arXiv 2506.20923.

    >>> relevance = Relevance(torch.tensor([[[0.0, 0.0]]]))
    >>> round(focal_loss(relevance, torch.tensor([0]), gamma=1.0).item(), 4)  # log(2) / 2
    0.3466
    """
    nll_Q = torch.nn.functional.cross_entropy(relevance.logits[0] / temperature, target_Q, reduction="none")
    hard_Q = (1 - (-nll_Q.detach()).exp()).clamp_min(0) ** gamma
    return (hard_Q * nll_Q).mean()


@register
class Focal(Loss):
    """L = mean_q (1 - p_q)^gamma * -log p_q, p_q the student's likelihood of q's positive: see `focal_loss`.

    Over the batch's passages or the query's own, as `contrastive`, in whose place it stands: set that one's weight to 0.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side
    >>> from lead_ds.relevance import ScoreFeatures
    >>> student = Side(ScoreFeatures(torch.zeros(1, 2, 4)))  # two queries with four passages each, all alike
    >>> loss = Focal(Focal.set(weight=1, gamma=1), LossShape(ModelFacts("cross_encoder", layers=3)))
    >>> round(loss(Views(student, None, Scope(group_size=4))).item(), 4)  # 3/4 log 4
    1.0397
    """

    name, Settings, needs = "focal", FocalSettings, frozenset({"labels"})

    def forward(self, views: Views) -> Tensor:
        settings = self.settings
        own = views.student.final.grouped or settings.scope == "group"
        passages: Literal["scope", "group"] = "group" if own else "scope"
        relevance = views.relevance("student", passages=passages)
        return focal_loss(relevance, views.target(passages), settings.temperature, settings.gamma)
