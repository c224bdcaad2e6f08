"""What losses of vectors share: the vectors of a model's final state, in the precision that they are compared in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lead_ds.errors import InputError
from lead_ds.losses.views import Side, Views
from lead_ds.relevance import VectorFeatures

Pairs = Literal["query_query", "passage_passage", "query_passage"]


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


def layer_vectors(side: Side | None, *, detach: bool = False) -> list[Vectors]:
    """Vectors of each layer that is compared, in the precision of `final_vectors`."""
    layers = None if side is None else side.layers
    if not isinstance(layers, VectorFeatures):
        raise ValueError("a loss reads vectors of layers, and there are none")
    found = zip(precise(layers.q_KQD), precise(layers.p_KPD), strict=True)
    return [Vectors(q.detach(), p.detach()) if detach else Vectors(q, p) for q, p in found]


@dataclass(frozen=True)
class Moments:
    """Sums over a sample of texts of t t^T [D_t, D_t], t s^T [D_t, D_s] and s s^T [D_s, D_s]; float64, on the CPU.

    t, s: the teacher's and the student's vectors.
    """

    tt: Tensor
    ts: Tensor
    ss: Tensor

    @classmethod
    def of(cls, student_BD: Tensor, teacher_BD: Tensor) -> Moments:
        """Of some texts' vectors.

        >>> moments = Moments.of(torch.eye(2), torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
        >>> moments.directions(1).flatten().tolist()
        [1.0, 0.0]
        >>> moments.ridge().round(decimals=2).tolist()
        [[0.0, 4.0], [3.0, 0.0]]
        """
        s_BD, t_BD = student_BD.detach().cpu().double(), teacher_BD.detach().cpu().double()
        return cls(t_BD.T @ t_BD, t_BD.T @ s_BD, s_BD.T @ s_BD)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.tt + other.tt, self.ts + other.ts, self.ss + other.ss)

    def directions(self, width: int) -> Tensor:
        """[D_t, width]: the directions in which the teacher's vectors are longest, as orthonormal columns; float32.

        About the origin, not the mean: they keep most of the inner products. Each one's largest component is positive.
        """
        columns_TD = torch.linalg.eigh(self.tt)[1].flip(1)[:, :width]
        largest_D = columns_TD.gather(0, columns_TD.abs().argmax(0, keepdim=True))
        return (columns_TD * largest_D.sign()).float()

    def ridge(self, strength: float = 1e-3) -> Tensor:
        """[D_t, D_s]: W that minimises sum |W s - t|^2 + strength * mean |s|^2 of a dimension * |W|^2; float32."""
        width = len(self.ss)
        damped_SS = self.ss + strength * self.ss.trace() / width * torch.eye(width, dtype=self.ss.dtype)
        return torch.linalg.solve(damped_SS, self.ts.T).T.float()


def matrices(views: Views, of: Sequence[Pairs], loss: str) -> list[tuple[Tensor, Tensor]]:
    """The student's and the teacher's cosines of a micro-batch's texts, a pair of matrices for each of `of`.

    Those without texts are left out: texts alone are passages, and there are no queries. Raises InputError where none is
    left, and where a model gives no vector per text.
    """
    both = final_vectors(views.student, "student", loss), final_vectors(views.teacher, "teacher", loss)
    sides = [{"query_query": (q, q), "passage_passage": (p, p), "query_passage": (q, p)} for q, p in both]
    student, teacher = ([cosines(*model[pairs]) for pairs in of] for model in sides)
    some = [(s, t) for s, t in zip(student, teacher, strict=True) if s.numel()]
    if not some:
        what = "is of queries, and texts alone stand among the passages"
        raise InputError(f"losses.{loss}.of", what, "add passage_passage")
    return some


def precise(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is: what 16 bits hold is summed in more."""
    return x if x.dtype == torch.float64 else x.float()


def cosines(x_AD: Tensor, y_BD: Tensor) -> Tensor:
    """[A, B]; 0 for a vector of length 0."""
    return normalize(x_AD, dim=-1) @ normalize(y_BD, dim=-1).T
