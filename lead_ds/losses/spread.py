"""Global orthogonal regularisation: different texts' vectors spread over the sphere as random directions would."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lead_ds.errors import InputError
from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.vectors import cosines, final_vectors
from lead_ds.losses.views import Views
from lead_ds.settings.base import each_once

Texts = Literal["queries", "passages"]


class SpreadSettings(LossSettings):
    """Global orthogonal regularisation of the student's vectors; needs no teacher."""

    of: Annotated[list[Texts], Field(min_length=1), each_once("a kind of text")] = Field(
        ["queries", "passages"], description="each kind counts alike"
    )


def spread_out(vectors_BD: Tensor, different_BB: Tensor | None = None) -> Tensor:
    """M1^2 + max(0, M2 - 1/D), M1 and M2 the mean and the mean square of cosines over pairs of different texts.

    vectors: [B, D]. different: [B, B] False where two rows are the same text; a row and itself never count. Random
    directions have a mean of 0 and a mean square of 1/D. A scalar of the vectors' dtype; 0 without a pair.
    Zhang et al., Learning Spread-out Local Feature Descriptors, arXiv 1708.06320.

    >>> spread_out(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).item()  # 1^2 + (1 - 1/2)
    1.5
    """
    texts, width = vectors_BD.shape
    keep_BB = ~torch.eye(texts, dtype=torch.bool, device=vectors_BD.device)
    if different_BB is not None:
        keep_BB = keep_BB & different_BB
    cosines_BB = cosines(vectors_BD, vectors_BD).masked_fill(~keep_BB, 0.0)
    pairs = keep_BB.sum().clamp_min(1)
    first, second = cosines_BB.sum() / pairs, cosines_BB.square().sum() / pairs
    return first.square() + (second - 1 / width).clamp_min(0.0)


@register
class Spread(Loss):
    """L = mean over kinds of text of M1^2 + max(0, M2 - 1/D), of the student's final vectors [D]: see `spread_out`.

    Pairs are of queries [Q] and of passages [Q * N] of this process's micro-batch; where duplicates are masked, the same
    passage twice is no pair. Zhang et al., arXiv 1708.06320.

    Raises InputError for a student without vectors of texts.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.eye(2)[None], torch.ones(1, 2, 2)))
    >>> loss = Spread(Spread.set(weight=1), LossShape(ModelFacts("dual_encoder", layers=3)))
    >>> round(loss(Views(student, None, Scope(group_size=1))).item(), 4)  # (0 + 1.5) / 2
    0.75
    """

    name, Settings, needs = "spread", SpreadSettings, frozenset()

    def forward(self, views: Views) -> Tensor:
        vectors = final_vectors(views.student, "student", self.name)
        keys_P = None if views.keys is None else views.keys[0]
        different_PP = None if keys_P is None else keys_P[:, None] != keys_P[None, :]
        of = {"queries": (vectors.queries, None), "passages": (vectors.passages, different_PP)}
        some = [spread_out(*of[kind]) for kind in self.settings.of if len(of[kind][0])]
        if not some:
            raise InputError("losses.spread.of", "names queries only, and every text here is a passage", "add passages")
        return torch.stack(some).mean()
