"""What losses of vectors share: the vectors of a model's final state, in the precision that they are compared in."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lead_ds.errors import InputError
from lead_ds.losses.views import Side
from lead_ds.relevance import VectorFeatures


class Vectors(NamedTuple):
    """Final vectors of this process's queries [Q, D] and passages [Q * N, D]."""

    queries: Tensor
    passages: Tensor


def final_vectors(side: Side | None, who: Literal["student", "teacher"], loss: str) -> Vectors:
    """A model's final vectors: float32, or float64 where they are; a teacher's carry no gradient, even if it is trained.

    Raises InputError where the model gives no vector per text.
    """
    final = None if side is None else side.final
    if not isinstance(final, VectorFeatures):
        given = "is missing" if final is None else "gives scores" if final.grouped else "gives a vector per token"
        what = f"compares vectors of texts, and the {who} {given}"
        raise InputError(f"losses.{loss}", what, "set its weight to 0, or name a model of vectors")
    vectors = Vectors(precise(final.q_KQD[-1]), precise(final.p_KPD[-1]))
    return vectors if who == "student" else Vectors(*(x.detach() for x in vectors))


def precise(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is: what 16 bits hold is summed in more."""
    return x if x.dtype == torch.float64 else x.float()


def cosines(x_AD: Tensor, y_BD: Tensor) -> Tensor:
    """[A, B]; 0 for a vector of length 0."""
    return normalize(x_AD, dim=-1) @ normalize(y_BD, dim=-1).T
