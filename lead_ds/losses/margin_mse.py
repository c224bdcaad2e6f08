"""Margin-MSE: the student's margins of the positive over each negative, drawn to the teacher's."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.views import Views
from lead_ds.relevance import Relevance


class MarginMSESettings(LossSettings):
    """Squared error between the teacher's and the student's margins of positive over negatives."""

    teacher_scale: float = Field(1.0, gt=0, description="multiplies the teacher's scores first")


def margin_mse(
    teacher: Relevance, student: Relevance, target_Q: Tensor, group_size: int, teacher_scale: float = 1.0
) -> Tensor:
    """Mean of ((t_pos - t_neg) * teacher_scale - (s_pos - s_neg))^2 over a query's own negatives.

    teacher, student: [1, Q, P]; target_Q: int64 column of the positive, which opens the query's group: its `group_size` - 1
    negatives are the columns that follow. Other queries' passages do not count, nor do masked columns. Returns a
    float32 scalar; 0 without a negative. Hofstaetter et al., arXiv 2010.02666.
    """
    columns_QN = target_Q.unsqueeze(-1) + torch.arange(group_size, device=target_Q.device)
    t_QN = teacher.logits[0].gather(1, columns_QN) * teacher_scale
    s_QN = student.logits[0].gather(1, columns_QN)
    difference = (t_QN[:, :1] - t_QN[:, 1:]) - (s_QN[:, :1] - s_QN[:, 1:])
    keep = torch.ones_like(columns_QN[:, 1:], dtype=torch.bool)
    for mask_QP in (teacher.mask, student.mask):
        if mask_QP is not None:
            keep = keep & mask_QP.gather(1, columns_QN[:, 1:])
    # Selected before squaring: a masked logit squared overflows, and 0 * inf would poison the gradient.
    return difference.masked_fill(~keep, 0.0).square().sum() / keep.sum().clamp_min(1)


@register
class MarginMSE(Loss):
    """L = mean_(q, n) ((t(q, p) - t(q, n)) * teacher_scale - (s(q, p) - s(q, n)))^2, of the query's own negatives n.

    Hofstaetter et al., arXiv 2010.02666.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side, Views
    >>> from lead_ds.relevance import ScoreFeatures
    >>> student, teacher = (Side(ScoreFeatures(torch.tensor(scores)[None, None])) for scores in ([1.0, 0.0], [4.0, 1.0]))
    >>> loss = MarginMSE(MarginMSE.set(weight=1), LossShape(ModelFacts("cross_encoder", layers=3)))
    >>> loss(Views(student, teacher, Scope(group_size=2))).item()  # (3 - 1)^2
    4.0
    """

    name, Settings, needs = "margin_mse", MarginMSESettings, frozenset({"final"})

    def forward(self, views: Views) -> Tensor:
        return margin_mse(*views.pair(), views.scope.group_size, self.settings.teacher_scale)
