"""KL divergence and entropy of relevance distributions: what response and layer losses share.

K layers, Q queries, P passages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_ds.kernels import Factors, factors_kl
from lead_ds.kernels.deviations import inverse_deviations
from lead_ds.kernels.layer_kl.inputs import stores_maps
from lead_ds.relevance import MASKED, Impl, Relevance

ENTROPY_QUERIES = (
    64  # entropies are a gauge, not a loss: so many queries suffice, and the full map is never made for them
)


def relevance_kl(
    teacher: Relevance | Tensor,
    student: Relevance | Tensor,
    target_Q: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of every layer pair, and the teacher's NLL of the positive at temperature 1.

    teacher, student: [K, Q, P], as `Relevance` or plain logits; target_Q: int64 column of the positive. Returns kl [K],
    averaged over queries, with gradient to the student and to a teacher that requires it, and nll [K] without gradient;
    nats, float32 (float64 for float64 logits). A column masked for either model leaves both distributions, which are
    renormalised. Raises ValueError for unequal shapes.

    Where both models hold vectors and the teacher needs no gradient, `kernels.factors_kl` computes it without the
    [K, Q, P] maps; z-scores have theirs while it takes at most 16 MiB.
    """
    if shape(teacher) != shape(student):
        raise ValueError(f"teacher relevance is {list(shape(teacher))}, student relevance {list(shape(student))}")
    mask_QP = _common_mask(teacher, student)
    t_factors, s_factors = _factors(teacher), _factors(student)
    if t_factors and s_factors and not any(factor.requires_grad for factor in t_factors):
        taught, learnt = _side(teacher, teacher_temperature), _side(student, student_temperature)
        return factors_kl(taught, learnt, target_Q, mask=mask_QP, impl=impl)
    t_KQP, s_KQP = _logits(teacher, mask_QP), _logits(student, mask_QP)
    t_log = (t_KQP / teacher_temperature).log_softmax(-1)
    s_log = (s_KQP / student_temperature).log_softmax(-1)
    kl_K = (t_log.exp() * (t_log - s_log)).sum(-1).mean(-1)
    with torch.no_grad():
        target_KQ1 = target_Q.expand(t_KQP.shape[0], -1).unsqueeze(-1)
        nll_K = -t_KQP.log_softmax(-1).gather(-1, target_KQ1).squeeze(-1).mean(-1)
    return kl_K, nll_K


@torch.no_grad()
def entropy(relevance: Relevance, temperature: float = 1.0) -> Tensor:
    """Mean entropy [K] in nats of the distributions of the first 64 queries: near 0 a layer is saturated."""
    if relevance.factors is not None:
        q_KQD, p_KPD = relevance.factors
        mask = None if relevance.mask is None else relevance.mask[:ENTROPY_QUERIES]
        factors = (q_KQD[:, :ENTROPY_QUERIES], p_KPD)
        relevance = Relevance(factors=factors, mask_QP=mask, scale=relevance.scale)
    log_KQP = (relevance.logits[:, :ENTROPY_QUERIES] / temperature).log_softmax(-1)
    return -(log_KQP.exp() * log_KQP).sum(-1).mean(-1)


def shape(relevance: Relevance | Tensor) -> tuple[int, ...]:
    """(K, Q, P) of a relevance, without multiplying its factors."""
    if isinstance(relevance, Tensor):
        return tuple(relevance.shape)
    if relevance.factors is None:
        return tuple(relevance.logits.shape)
    q_KQD, p_KPD = relevance.factors
    return q_KQD.shape[0], q_KQD.shape[1], p_KPD.shape[1]


def _factors(relevance: Relevance | Tensor) -> tuple[Tensor, Tensor] | None:
    """The vectors of which a kernel makes scores; None of logits, and of z-scores whose map is small: to hold it is faster."""
    if isinstance(relevance, Tensor) or relevance.factors is None:
        return None
    return None if relevance.scale == "standard" and stores_maps(*shape(relevance)) else relevance.factors


def _side(relevance: Relevance | Tensor, temperature: float) -> Factors:
    """As kernels take it. 16-bit vectors go in as they are: their products are exact in float32, in which they are summed."""
    assert isinstance(relevance, Relevance)
    assert relevance.factors is not None
    # Of z-scores, only the deviation: a softmax is the same at any mean.
    deviations = inverse_deviations(*relevance.factors, relevance.mask) if relevance.scale == "standard" else None
    return Factors(*relevance.factors, temperature, relevance.scale == "cosine", deviations)


def _common_mask(teacher: Relevance | Tensor, student: Relevance | Tensor) -> Tensor | None:
    masks = [x.mask for x in (teacher, student) if isinstance(x, Relevance) and x.mask is not None]
    if len(masks) == 2 and masks[0] is not masks[1]:
        return masks[0] & masks[1]
    return masks[0] if masks else None


def _logits(relevance: Relevance | Tensor, mask_QP: Tensor | None) -> Tensor:
    logits = relevance.logits if isinstance(relevance, Relevance) else relevance
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if mask_QP is None else logits.masked_fill(~mask_QP, MASKED)
