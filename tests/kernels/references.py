"""The references by the signatures of their operators, so that a test calls both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lead_ds.kernels.attention_kl import reference as attention
from lead_ds.kernels.attention_kl.inputs import Maps
from lead_ds.kernels.grouped import reference as grouped
from lead_ds.kernels.interaction import reference as interaction
from lead_ds.kernels.layer_kl import reference as layer
from lead_ds.kernels.layer_kl.inputs import Factors


def by_tensors(reference: Callable[..., Tensor], usual: float | None = None) -> Callable[..., Tensor]:
    """Of tq, tk, sq, sk and scales, in place of one argument a model."""

    def call(
        tq: Tensor,
        tk: Tensor,
        sq: Tensor,
        sk: Tensor,
        *rest: Any,
        teacher_scale: Any = usual,
        student_scale: Any = usual,
        **how: Any,
    ) -> Tensor:
        return reference(Maps(tq, tk, teacher_scale), Maps(sq, sk, student_scale), *rest, **how)

    return call


attention_kl_reference = by_tensors(attention.attention_kl_reference)
grouped_attention_kl_reference = by_tensors(grouped.grouped_attention_kl_reference)
interaction_reference = by_tensors(interaction.interaction_reference, 1.0)


def layer_kl_reference(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    *temperatures: float,
    cosine: Any = (False, False),
    scale: Any = (None, None),
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """Of tq, td, sq, sd, temperatures, cosines and row_scales, in place of one argument a model."""
    of_teacher, of_student = temperatures or (1.0, 1.0)
    return layer.layer_kl_reference(
        Factors(tq, td, of_teacher, cosine[0], scale[0]),
        Factors(sq, sd, of_student, cosine[1], scale[1]),
        target,
        **how,
    )
