"""How alike the texts of a batch are to each other: the student's similarity matrices drawn to the teacher's."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.vectors import Pairs, matrices
from lead_ds.losses.views import Views
from lead_ds.settings.base import each_once


class SimilaritySettings(LossSettings):
    """Squared error between the student's and the teacher's cosines of a batch's texts."""

    of: Annotated[list[Pairs], Field(min_length=1), each_once("a matrix")] = Field(
        ["query_query", "passage_passage", "query_passage"], description="each matrix counts alike"
    )


def similarity_mse(student_AB: Tensor, teacher_AB: Tensor) -> Tensor:
    """Mean squared difference of two similarity matrices [A, B]; a scalar of their dtype, gradient to both.

    Jasper and Stella, arXiv 2412.19048.
    """
    return (student_AB - teacher_AB).square().mean()


@register
class Similarity(Loss):
    """L = mean over matrices of mean_(a, b) (cos(s_a, s_b) - cos(t_a, t_b))^2, of final vectors, whatever their widths.

    a and b are queries [Q] and passages [Q * N] of this process's micro-batch; a text's cosine with itself, 1 for both
    models, is among the pairs. The teacher gets no gradient. Jasper and Stella, arXiv 2412.19048.

    Raises InputError for models without vectors of texts.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])))
    >>> teacher = Side(VectorFeatures(torch.tensor([[[1.0]]]), torch.tensor([[[2.0]]])))
    >>> facts = ModelFacts("dual_encoder", layers=3)
    >>> loss = Similarity(Similarity.set(weight=1, of=["query_passage"]), LossShape(facts, facts))
    >>> loss(Views(student, teacher, Scope(group_size=1))).item()  # (0 - 1)^2
    1.0
    """

    name, Settings, needs = "similarity", SimilaritySettings, frozenset({"features"})

    def forward(self, views: Views) -> Tensor:
        return torch.stack([similarity_mse(s, t) for s, t in matrices(views, self.settings.of, self.name)]).mean()
