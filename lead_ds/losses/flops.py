"""The FLOPS regulariser: a sparse student's vectors are drawn to have few terms, and no term that most texts have."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from lead_ds.errors import InputError
from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.vectors import final_vectors
from lead_ds.losses.views import Views
from lead_ds.settings.base import NonNegative, Weight


class FlopsSettings(LossSettings):
    """FLOPS regulariser of a sparse student's vectors; needs no teacher."""

    queries: Weight = Field(1.0, description="how much the vectors of queries count, times weight")
    passages: Weight = Field(1.0, description="how much those of passages count, times weight")
    warmup_steps: NonNegative = Field(
        0, description="steps over which the weight grows to what is set, as their square; 0: it counts whole at once"
    )

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if self.weight > 0 and self.queries == 0 and self.passages == 0:
            raise ValueError("counts neither queries nor passages: set one above 0, or weight to 0")
        return self


def flops(vectors_BV: Tensor) -> Tensor:
    """sum_j (mean_i |w_ij|)^2 of texts' vectors [B, V]; a scalar of their dtype.

    An estimate of the products that an inverted index takes for a query. Paria et al., Minimizing FLOPs to Learn Efficient
    Sparse Representations, arXiv 2004.05665.

    >>> flops(torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])).item()  # 1^2 + 1^2
    2.0
    """
    return vectors_BV.abs().mean(0).square().sum()


@register
class Flops(Loss):
    """L = queries * FLOPS(q) + passages * FLOPS(p), of the vectors [V] of this process's micro-batch: see `flops`.

    Its weight grows as the square of the steps, until `warmup_steps`, as SPLADE's does (arXiv 2109.10086). A vector that is
    drawn to no terms before it has learned any has no way back. Reports how many terms of a query and of a passage are
    not zero. Paria et al., arXiv 2004.05665.

    Raises InputError for a student without vectors of texts.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 1.0]]])))
    >>> loss = Flops(Flops.set(weight=1, passages=0.5), LossShape(ModelFacts("sparse", layers=3)))
    >>> loss(Views(student, None, Scope(group_size=1)))[0].item()  # 1 + 0.5 * 10
    6.0
    """

    name, Settings, needs = "flops", FlopsSettings, frozenset()

    def strength(self, step: int) -> float:
        steps = self.settings.warmup_steps
        return float(min(1.0, ((step + 1) / steps) ** 2)) if steps else 1.0

    def forward(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, and the mean number of terms of a query and of a passage."""
        vectors = final_vectors(views.student, "student", self.name)
        some = {side: x for side, x in vectors._asdict().items() if len(x)}
        weights = {side: getattr(self.settings, side) for side in some}
        if not any(weights.values()):
            raise InputError(
                "losses.flops",
                "counts terms of queries only, and every text here is a passage",
                "set its passages above 0",
            )
        loss = torch.stack([weights[side] * flops(x) for side, x in some.items()]).sum()
        return loss, {f"terms_{side}": (x.detach() != 0).sum(1).float().mean() for side, x in some.items()}
