"""Margin-MSE: the student's margins of the positive over each negative, drawn to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from lead_ds.relevance import Relevance


def margin_mse(
    teacher: Relevance, student: Relevance, target_Q: Tensor, group: int, teacher_scale: float = 1.0
) -> Tensor:
    """Mean of ((t_pos - t_neg) * teacher_scale - (s_pos - s_neg))^2 over a query's own negatives.

    teacher, student: [1, Q, P]; target_Q: int64 column of the positive, which opens the query's group: its `group` - 1
    negatives are the columns that follow. Other queries' passages do not count, nor do masked columns. Returns a
    float32 scalar; 0 without a negative. Hofstaetter et al., arXiv 2010.02666.
    """
    columns_QN = target_Q.unsqueeze(-1) + torch.arange(group, device=target_Q.device)
    t_QN = teacher.logits[0].gather(1, columns_QN) * teacher_scale
    s_QN = student.logits[0].gather(1, columns_QN)
    difference = (t_QN[:, :1] - t_QN[:, 1:]) - (s_QN[:, :1] - s_QN[:, 1:])
    keep = torch.ones_like(columns_QN[:, 1:], dtype=torch.bool)
    for mask_QP in (teacher.mask, student.mask):
        if mask_QP is not None:
            keep = keep & mask_QP.gather(1, columns_QN[:, 1:])
    # Selected before squaring: a masked logit squared overflows, and 0 * inf would poison the gradient.
    return difference.masked_fill(~keep, 0.0).square().sum() / keep.sum().clamp_min(1)
