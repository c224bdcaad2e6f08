"""L_rep: the student's final relevance drawn to the teacher's."""

from __future__ import annotations

from torch import Tensor

from lead_ds.losses.divergence import relevance_kl
from lead_ds.relevance import Impl, Relevance


def response_kl(
    teacher: Relevance,
    student: Relevance,
    target_Q: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """KL(teacher || student) of the final distributions; with `reverse`, KL(student || teacher).

    teacher, student: [1, Q, P] over common passages; each keeps its own temperature in either direction. Gradient goes
    to every argument that requires it: LEAD (arXiv 2212.05225) adds the reverse where the teacher is co-trained.
    Returns a float32 scalar, nats, averaged over queries.
    """
    if reverse:
        kl_K, _ = relevance_kl(student, teacher, target_Q, student_temperature, teacher_temperature, impl=impl)
    else:
        kl_K, _ = relevance_kl(teacher, student, target_Q, teacher_temperature, student_temperature, impl=impl)
    return kl_K[0]
