"""Which of two texts is the nearer to a third: the student's order of triplets drawn to the teacher's."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.vectors import Pairs, matrices
from lead_ds.losses.views import Views
from lead_ds.settings.base import each_once

_AT_ONCE = 1 << 24  # triplets held at once


class OrderSettings(LossSettings):
    """Hinge on triplets of a batch's texts that the student orders otherwise than the teacher."""

    of: Annotated[list[Pairs], Field(min_length=1), each_once("a kind of pairs")] = Field(
        ["query_query", "passage_passage", "query_passage"],
        description="which texts are ordered by their cosines to which; each counts alike",
    )
    margin: float = Field(
        0.015, ge=0, allow_inf_nan=False, description="of cosines, by which the nearer must be nearer"
    )


def triplet_order(student_AB: Tensor, teacher_AB: Tensor, margin: float = 0.015) -> Tensor:
    """Mean over triplets (a, b, c) with t_ab > t_ac of max(0, margin - (s_ab - s_ac)); 0 where there is none.

    student, teacher: similarities [A, B] of texts a to texts b. A scalar of their dtype, gradient to the student.
    Memory is bounded: the triplets of some rows at a time are made again in the backward pass.
    Jasper and Stella, arXiv 2412.19048, the loss of relative similarity, on triplets with a text in common.

    >>> s, t = torch.tensor([[0.1, 0.3]]), torch.tensor([[0.9, 0.2]])
    >>> round(triplet_order(s, t, margin=0.1).item(), 4)  # the teacher's nearer one is 0.2 farther
    0.3
    """
    rows = max(1, _AT_ONCE // student_AB.shape[1] ** 2)
    parts = zip(student_AB.split(rows), teacher_AB.split(rows), strict=True)
    found = [checkpoint(_hinges, s, t, margin, use_reentrant=False) for s, t in parts]
    return torch.stack([hinges for hinges, _ in found]).sum() / torch.stack([n for _, n in found]).sum().clamp_min(1)


def _hinges(s_AB: Tensor, t_AB: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The sum over triplets, and how many there are."""
    nearer_ABB = t_AB[:, :, None] > t_AB[:, None, :]
    hinges_ABB = (margin - (s_AB[:, :, None] - s_AB[:, None, :])).clamp_min(0)
    return hinges_ABB.masked_fill(~nearer_ABB, 0).sum(), nearer_ABB.sum()


@register
class Order(Loss):
    """L = mean over kinds of pairs of `triplet_order` of both models' cosines, of final vectors, whatever their widths.

    Texts are queries [Q] and passages [Q * N] of this process's micro-batch. The teacher gets no gradient. Jasper and
    Stella, arXiv 2412.19048.

    Raises InputError for models without vectors of texts.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> q = torch.tensor([[[1.0, 0.0]]])
    >>> student = Side(VectorFeatures(q, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])))
    >>> teacher = Side(VectorFeatures(q, torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])))
    >>> facts = ModelFacts("dual_encoder", layers=3)
    >>> loss = Order(Order.set(weight=1, of=["query_passage"], margin=0), LossShape(facts, facts))
    >>> loss(Views(student, teacher, Scope(group_size=2))).item()  # the nearer passage is the farther one, by 1
    1.0
    """

    name, Settings, needs = "order", OrderSettings, frozenset({"features"})

    def forward(self, views: Views) -> Tensor:
        margin = self.settings.margin
        return torch.stack(
            [triplet_order(s, t, margin) for s, t in matrices(views, self.settings.of, self.name)]
        ).mean()
