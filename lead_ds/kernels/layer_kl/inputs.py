"""What a caller passes to `layer_kl`, what its implementations are given, and what a forward pass saves.

Dimensions: K layer pairs, Q queries, P passages, D width (teacher and student each their own).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lead_ds.kernels.dispatch import accumulation_dtype
from lead_ds.kernels.vectors import unit

# 16 MiB of float32: so much of both models' scores the Triton kernels keep for the backward pass.
_STORED_SCORES = 1 << 22
# Of the gradient's size, what the torch implementation's residuals may have.
_RESIDUAL_SHARE = 1


class Factors(NamedTuple):
    """A model's relevance as factors: q [K, Q, D], d [K, P, D]; a score is q . d, or their cosine, over the temperature.

    row_scale [K, Q], positive, float32: each query's scores are multiplied by it. It may carry gradient.
    """

    q: Tensor
    d: Tensor
    temperature: float = 1.0
    cosine: bool = False
    row_scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of them that there are: q, d, row_scale."""
        return tuple(x for x in (self.q, self.d, self.row_scale) if x is not None)

    @property
    def scaled(self) -> bool:
        """Whether a score is more than a product of the vectors."""
        return self.cosine or self.row_scale is not None

    def plain(self) -> "Factors":
        """The same with scores that are products: vectors of length 1, queries scaled."""
        q, d = (unit(self.q), unit(self.d)) if self.cosine else (self.q, self.d)
        if self.row_scale is not None:
            q = q.to(accumulation_dtype(q.dtype)) * self.row_scale[..., None]
            d = d.to(q.dtype)
        return Factors(q, d, self.temperature)


@dataclass(frozen=True)
class Problem:
    """A checked call: target [Q] int64, mask [Q, P] bool (False: that passage is left out, unless it is the target)."""

    teacher: Factors
    student: Factors
    target: Tensor
    mask: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """K, Q, P."""
        return self.teacher.q.shape[0], self.teacher.q.shape[1], self.teacher.d.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """That of the results and of what is saved."""
        return accumulation_dtype(torch.promote_types(self.teacher.q.dtype, self.student.q.dtype))

    def plain(self) -> "Problem":
        """The same with scores that are products."""
        return replace(self, teacher=self.teacher.plain(), student=self.student.plain())

    def flat(self) -> tuple[Any, ...]:
        """As the operator takes it: tensors and numbers, one after the other."""
        t, s = self.teacher, self.student
        tensors = t.q, t.d, s.q, s.d, self.target, self.mask, t.row_scale, s.row_scale
        return *tensors, t.temperature, s.temperature, t.cosine, s.cosine

    @classmethod
    def of(cls, tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, *rest: Any) -> "Problem":
        """The inverse of `flat`."""
        target, mask, *both = rest
        t_scale, s_scale, t_temperature, s_temperature, t_cosine, s_cosine = both
        teacher = Factors(tq, td, t_temperature, t_cosine, t_scale)
        return cls(teacher, Factors(sq, sd, s_temperature, s_cosine, s_scale), target, mask)


def checked(teacher: Factors, student: Factors, target: Tensor, mask: Tensor | None) -> Problem:
    """The call in one form. Raises ValueError where shapes or temperatures do not fit or the teacher requires a gradient."""
    for side, (q, d, temperature, cosine, row_scale) in (("teacher", teacher), ("student", student)):
        if q.dim() != 3 or d.dim() != 3 or q.shape[0] != d.shape[0] or q.shape[2] != d.shape[2]:
            raise ValueError(
                f"layer_kl: the {side}'s queries and passages must be [K, Q, D] and [K, P, D],"
                f" not {tuple(q.shape)} and {tuple(d.shape)}"
            )
        if not temperature > 0:
            raise ValueError(f"layer_kl: temperatures must be positive, not {temperature}")
        if row_scale is not None and cosine:
            raise ValueError(f"layer_kl: the {side}'s scores are cosines or have a row_scale, not both")
        if row_scale is not None and row_scale.shape != q.shape[:2]:
            raise ValueError(f"layer_kl: row_scale must be {tuple(q.shape[:2])}, not {tuple(row_scale.shape)}")
    t_q, t_d = teacher[:2]
    if t_q.shape[:2] != student.q.shape[:2] or t_d.shape[1] != student.d.shape[1]:
        raise ValueError(
            f"layer_kl: teacher {tuple(t_q.shape)}, {tuple(t_d.shape)} and student {tuple(student.q.shape)},"
            f" {tuple(student.d.shape)} must agree in layers, queries and passages"
        )
    if target.shape != t_q.shape[1:2]:
        raise ValueError(f"layer_kl: target must be [{t_q.shape[1]}], not {tuple(target.shape)}")
    if mask is not None and mask.shape != (t_q.shape[1], t_d.shape[1]):
        raise ValueError(f"layer_kl: mask must be {(t_q.shape[1], t_d.shape[1])}, not {tuple(mask.shape)}")
    if any(x.requires_grad for x in teacher.tensors):
        raise ValueError("layer_kl: the teacher is a constant; detach its q, d and row_scale")
    mask = None if mask is None else mask.to(torch.bool)
    return Problem(_one_dtype(teacher), _one_dtype(student), target, mask)


def _one_dtype(factors: Factors) -> Factors:
    dtype = torch.promote_types(factors.q.dtype, factors.d.dtype)
    return factors._replace(q=factors.q.to(dtype), d=factors.d.to(dtype), temperature=float(factors.temperature))


def stores_maps(layers: int, queries: int, passages: int) -> bool:
    """Whether the Triton forward pass keeps both models' scores for the backward pass.

    A LEAD batch has a few hundred thousand scores: keeping them costs less than launching their recomputation. At
    retrieval-training sizes the maps are gigabytes, and only the rows' log-sum-exps are kept.
    """
    return layers * queries * passages <= _STORED_SCORES


def keeps_residual(problem: Problem) -> bool:
    """Whether the torch forward pass keeps R - P: where that is smaller than the gradient."""
    _, queries, passages = problem.shape
    return queries * passages <= _RESIDUAL_SHARE * (queries + passages) * problem.student.q.shape[2]


def saved_shapes(problem: Problem, impl: str, differentiable: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two tensors that a forward pass saves.

    torch: the residuals R - P [K, Q, P], or the gradients of the student's q and d for a KL of weight 1. Triton: both
    models' scores [2, K, Q, P], P rounded up, where they are stored; and log-sum-exps [2, K, Q].
    """
    layers, queries, passages = problem.shape
    if not differentiable:
        return (0,), (0,)
    if impl == "torch":
        if keeps_residual(problem):
            return (layers, queries, passages), (0,)
        return tuple(problem.student.q.shape), tuple(problem.student.d.shape)
    lse = (2, layers, queries)
    if not stores_maps(layers, queries, passages):
        return (0,), lse
    # Rows that start on a 16-element boundary let the kernels read and write several elements at once.
    return (2, layers, queries, -(-passages // 16) * 16), lse
