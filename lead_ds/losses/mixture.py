"""Several teachers as one: a mixture of their distributions, or a concatenation of their vectors.

Dimensions: T teachers, Q queries, P passages in scope, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lead_ds.errors import InputError
from lead_ds.losses.views import Passages, Side, Views, What, Who
from lead_ds.relevance import Features, Relevance, VectorFeatures


def mixture(teachers: Sequence[Relevance], shares: Sequence[float], target_Q: Tensor) -> Relevance:
    """log sum_t w_t(q) p_t(p | q), with w_t(q) proportional to shares_t p_t(target | q); p_t = softmax of a teacher's relevance.

    teachers: relevance [1, Q, P] each, over the same passages; target_Q: int64 column of the positive. A teacher counts
    for a query by what its own NLL of the positive is, as LEAD weighs layers (arXiv 2212.05225). Returns [1, Q, P],
    float32, without gradient; a passage that is masked for one teacher is masked.

    >>> sure, unsure = (Relevance(torch.tensor([[[p, 1 - p]]]).log()) for p in (0.9, 0.3))
    >>> mixture([sure, unsure], [1.0, 1.0], torch.tensor([0])).logits.exp().round(decimals=3).tolist()  # 3 to 1
    [[[0.75, 0.25]]]
    """
    log_TQP = torch.stack([teacher.logits[0].detach().log_softmax(-1) for teacher in teachers])
    found_TQ = log_TQP.gather(-1, target_Q.expand(len(teachers), -1).unsqueeze(-1)).squeeze(-1)
    # Numbers of the host one by one: a tensor of them would be copied to a GPU, which waits.
    prior_TQ = torch.stack([found_Q + math.log(share) for found_Q, share in zip(found_TQ, shares, strict=True)])
    weight_TQ = prior_TQ.log_softmax(0)
    masks = [teacher.mask for teacher in teachers if teacher.mask is not None]
    mask_QP = torch.stack(masks).all(0) if masks else None
    return Relevance((weight_TQ.unsqueeze(-1) + log_TQP).logsumexp(0).unsqueeze(0), mask_QP=mask_QP)


def concatenated(teachers: Sequence[Features], shares: Sequence[float]) -> VectorFeatures:
    """Final vectors [1, texts, sum of D], each teacher's at length sqrt(share).

    shares: of 1. So a text's vector has length 1, and cosines are the teachers' cosines, averaged by their shares.
    Raises InputError for a teacher that gives none.
    """
    finals = [one for one in teachers if isinstance(one, VectorFeatures)]
    if len(finals) < len(teachers):
        what = "concatenate: a teacher gives no vector of a text"
        raise InputError("mix.vectors", what, "set it to fold, or name the losses that this one feeds")

    def joined(vectors: Sequence[Tensor]) -> Tensor:
        parts = [normalize(x.float(), dim=-1) * share**0.5 for x, share in zip(vectors, shares, strict=True)]
        return torch.cat(parts, -1)

    return VectorFeatures(joined([one.q_KQD for one in finals]), joined([one.p_KPD for one in finals]))


@dataclass
class Mixed(Views):
    """Views of several teachers whose final relevance is mixed; there is nothing else of them to read."""

    sources: Sequence[Views] = field(kw_only=True)
    shares: Sequence[float] = field(kw_only=True)

    @classmethod
    def of(cls, sources: Sequence[Views], shares: Sequence[float]) -> Mixed:
        """Of views of one student with a teacher each."""
        first = sources[0]
        return cls(first.student, None, first.scope, first.keys, sources=sources, shares=shares)

    @property
    def common(self) -> Passages:
        """See `Views`: a query's own passages, if one of the teachers knows of no others."""
        return "group" if any(source.common == "group" for source in self.sources) else "scope"

    @property
    def mask(self) -> Tensor | None:
        return self.sources[0].mask

    def _gathered(self, who: Who, what: What) -> Features:
        return self.sources[0]._gathered(who, what)

    def relevance(self, who: Who, what: What = "final", passages: Passages = "scope") -> Relevance:
        """See `Views`: a teacher's is the mixture."""
        if who == "student":
            return self.sources[0].relevance(who, what, passages)

        def mixed() -> Relevance:
            each = [source.relevance(who, what, passages) for source in self.sources]
            return mixture(each, self.shares, self.target(passages))

        return self._once((who, what, passages), mixed)


def together(sources: Sequence[Views], shares: Sequence[float], how: str) -> Views:
    """Views of one student with several teachers as one: `mixed`, of their relevance, or `concatenated`, of their vectors."""
    if how == "mixed":
        return Mixed.of(sources, shares)
    finals = [source.teacher.final for source in sources if source.teacher is not None]
    return sources[0].beside(Side(concatenated(finals, shares)))
