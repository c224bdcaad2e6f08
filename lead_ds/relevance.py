"""Layer features and the one noun of this project, relevance.

For a micro-batch and each of K selected layers, a model gives the relevance of passages to queries. Three forms of
features carry that: pooled vectors (dual encoder), token states (ColBERT) and scores (cross-encoder, decoder reranker).
Each gives a `Relevance`, [K, Q, P]; nothing past this file need know which family a model is of.

Dimensions: K selected layers, Q queries, P passages, N passages of each query (its group: the positive first), L tokens,
D width. In a batch, passage j of query i is row i*N + j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from lead_ds.kernels import maxsim
from lead_ds.kernels.deviations import centred
from lead_ds.kernels.products import products

Scale = Literal["none", "cosine", "standard"]
Impl = Literal["auto", "triton", "torch"]

MASKED = -1e30  # finite: -inf minus -inf would poison a masked row's gradient


class Relevance:
    """Relevance logits [K, Q, P], held as the tensor itself or as the two vector factors whose product it is.

    Factors let a kernel compute a divergence without the [K, Q, P] map. They keep the dtype of the features; `scale`
    says what is made of their products. `mask` [Q, P] (False: that passage is left out of the query's distribution) is
    applied to `logits` and handed to kernels beside `factors`.

    >>> Relevance(factors=(torch.ones(1, 1, 2), torch.ones(1, 3, 2))).logits.tolist()
    [[[2.0, 2.0, 2.0]]]
    """

    def __init__(
        self,
        logits_KQP: Tensor | None = None,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        mask_QP: Tensor | None = None,
        scale: Scale = "none",
    ) -> None:
        if (logits_KQP is None) == (factors is None):
            raise ValueError("give the logits or the factors, one of them")
        self.factors = factors
        self.scale = scale
        self.mask = mask_QP
        self._logits = logits_KQP

    @property
    def logits(self) -> Tensor:
        """[K, Q, P] in float32; masked entries hold a large negative number."""
        if self._logits is None:
            assert self.factors is not None
            self._logits = products(*self.factors, cosine=self.scale == "cosine")
            if self.scale == "standard":
                self._logits = standardised(self._logits, self.mask)
        logits = self._logits.float()
        return logits if self.mask is None else logits.masked_fill(~self.mask, MASKED)

    def detach(self) -> Relevance:
        """The same relevance without gradient."""
        logits = None if self._logits is None or self.factors is not None else self._logits.detach()
        factors = None if self.factors is None else (self.factors[0].detach(), self.factors[1].detach())
        return Relevance(logits, factors=factors, mask_QP=self.mask, scale=self.scale)


class Gather(Protocol):
    """Joins what several processes hold of a batch."""

    def along(self, x: Tensor, dim: int) -> Tensor:
        """`x` of every process, joined along `dim` in order of rank; equal shapes everywhere; carries gradient."""

    def largest(self, n: int, device: torch.device) -> int:
        """The largest of every process's `n`; a GPU is waited for."""


F = TypeVar("F", bound="Features")


class Features(ABC):
    """What a model gives for a micro-batch's texts, K layers at once. Immutable: every method gives new features.

    `scale`: what its relevance is put through. `grouped`: it knows only of a query's own passages.
    """

    grouped: ClassVar[bool] = False
    _states: ClassVar[tuple[str, ...]]  # fields that begin with dimension K and may carry gradient
    scale: Scale

    @property
    def queries(self) -> int:
        """Q."""
        return self._state.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the features live."""
        return self._state.device

    @property
    def width(self) -> int | None:
        """D, the width of its vectors; None where there are only scores."""
        return None if self.grouped else self._state.shape[-1]

    @property
    def _state(self) -> Tensor:
        return getattr(self, self._states[0])

    @abstractmethod
    def micro(self: F, start: int, stop: int, group_size: int) -> F:
        """Queries start..stop and their own passages."""

    @abstractmethod
    def relevance(self, mask_QP: Tensor | None = None, impl: Impl = "auto") -> Relevance:
        """Every query against every passage: [K, Q, P]."""

    @abstractmethod
    def group_relevance(self, group_size: int, impl: Impl = "auto") -> Relevance:
        """Every query against its own N passages: [K, Q, N]."""

    @abstractmethod
    def merged(self: F, others: Sequence[F]) -> F:
        """These and the features of the batch's next slices, joined in order; token states are padded to the longest."""

    @abstractmethod
    def gathered(self: F, over: Gather) -> F:
        """With the passages of every process; queries stay this one's own."""

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [x for x in vars(self).values() if isinstance(x, Tensor)]

    def detach(self: F) -> F:
        """Without gradient."""
        return self._changed(Tensor.detach)

    def at(self: F, places: Sequence[int]) -> F:
        """Of the layers at `places` of K, in that order."""
        if list(places) == list(range(len(self._state))):
            return self
        # Not by a list of indices, which a GPU would have to wait for.
        return self._changed(lambda x_K: torch.stack([x_K[place] for place in places]))

    def truncated(self: F, width: int, *, unit: bool = False) -> F:
        """The first `width` dimensions of its vectors, at length 1 where `unit`; scores stay as they are."""

        def first(x_KD: Tensor) -> Tensor:
            return torch.nn.functional.normalize(x_KD[..., :width], dim=-1) if unit else x_KD[..., :width]

        return self.of_vectors(first)

    def of_vectors(self: F, change: Callable[[Tensor], Tensor]) -> F:
        """With `change` of its vectors [..., D]; scores stay as they are."""
        return self if self.width is None else self._changed(change)

    def _changed(self: F, change: Callable[[Tensor], Tensor]) -> F:
        changes: dict[str, Any] = {name: change(getattr(self, name)) for name in self._states}
        return replace(self, **changes)  # type: ignore[type-var]  # every subclass is a dataclass


@dataclass(frozen=True)
class VectorFeatures(Features):
    """One pooled vector per layer and text: q_KQD [K, Q, D], p_KPD [K, P, D].

    >>> one = VectorFeatures(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), scale="cosine")
    >>> one.group_relevance(2).logits.tolist()
    [[[1.0, 0.0]]]
    """

    _states = ("q_KQD", "p_KPD")
    q_KQD: Tensor
    p_KPD: Tensor
    scale: Scale = "none"

    def micro(self, start: int, stop: int, group_size: int) -> VectorFeatures:
        own = slice(start * group_size, stop * group_size)
        return replace(self, q_KQD=self.q_KQD[:, start:stop], p_KPD=self.p_KPD[:, own])

    def relevance(self, mask_QP: Tensor | None = None, impl: Impl = "auto") -> Relevance:
        """Every query against every passage, as factors."""
        return Relevance(factors=(self.q_KQD, self.p_KPD), mask_QP=mask_QP, scale=self.scale)

    def group_relevance(self, group_size: int, impl: Impl = "auto") -> Relevance:
        q_B1D, p_BND = self.q_KQD.flatten(0, 1)[:, None], self.p_KPD.flatten(0, 1).unflatten(0, (-1, group_size))
        scores_KQN = products(q_B1D, p_BND, cosine=self.scale == "cosine").view(*self.q_KQD.shape[:2], group_size)
        return Relevance(standardised(scores_KQN) if self.scale == "standard" else scores_KQN)

    def merged(self, others: Sequence[VectorFeatures]) -> VectorFeatures:
        if not others:
            return self
        parts = [self, *others]
        return replace(self, q_KQD=torch.cat([f.q_KQD for f in parts], 1), p_KPD=torch.cat([f.p_KPD for f in parts], 1))

    def gathered(self, over: Gather) -> VectorFeatures:
        return replace(self, p_KPD=over.along(self.p_KPD, 1))


@dataclass(frozen=True)
class TokenFeatures(Features):
    """Token states: q_KQLD [K, Q, Lq, D] with q_mask_QL, p_KPLD [K, P, Lp, D] with p_mask_PL (1: a token that counts).

    >>> states, mask = torch.eye(2)[None, None], torch.tensor([[1, 0]])
    >>> TokenFeatures(states, torch.ones(1, 2), states, mask).relevance().logits.tolist()  # of two tokens, one meets itself
    [[[1.0]]]
    """

    _states = ("q_KQLD", "p_KPLD")
    q_KQLD: Tensor
    q_mask_QL: Tensor
    p_KPLD: Tensor
    p_mask_PL: Tensor
    scale: Scale = "none"
    longest: int | None = None  # tokens that every process pads passages to, where they have agreed on it

    def micro(self, start: int, stop: int, group_size: int) -> TokenFeatures:
        own = slice(start * group_size, stop * group_size)
        return replace(
            self,
            q_KQLD=self.q_KQLD[:, start:stop],
            q_mask_QL=self.q_mask_QL[start:stop],
            p_KPLD=self.p_KPLD[:, own],
            p_mask_PL=self.p_mask_PL[own],
        )

    def relevance(self, mask_QP: Tensor | None = None, impl: Impl = "auto") -> Relevance:
        """MaxSim of every query with every passage."""
        masks, cosine = (self.q_mask_QL, self.p_mask_PL), self.scale == "cosine"
        layers = zip(self.q_KQLD, self.p_KPLD, strict=True)
        scores_KQP = torch.stack([maxsim(q, p, *masks, cosine=cosine, impl=impl) for q, p in layers])
        if self.scale == "standard":
            scores_KQP = standardised(scores_KQP, mask_QP)
        return Relevance(scores_KQP, mask_QP=mask_QP)

    def group_relevance(self, group_size: int, impl: Impl = "auto") -> Relevance:
        """MaxSim of every query with its own N passages: [K, Q, N]."""
        q_BLD, p_BMD = self.q_KQLD.flatten(0, 1), self.p_KPLD.flatten(0, 1).unflatten(0, (-1, group_size)).flatten(1, 2)
        similarity = products(q_BLD, p_BMD, cosine=self.scale == "cosine")
        similarity = similarity.unflatten(2, (group_size, -1)).transpose(1, 2).unflatten(0, self.q_KQLD.shape[:2])
        mask_QNM = self.p_mask_PL.bool().unflatten(0, (-1, group_size))
        best = similarity.masked_fill(~mask_QNM[None, :, :, None, :], MASKED).amax(-1)
        best = best.masked_fill(~mask_QNM.any(-1)[None, :, :, None], 0.0)  # a fully masked passage scores 0
        scores_KQN = (best * self.q_mask_QL[None, :, None, :].to(best.dtype)).sum(-1)
        return Relevance(standardised(scores_KQN) if self.scale == "standard" else scores_KQN)

    def merged(self, others: Sequence[TokenFeatures]) -> TokenFeatures:
        if not others:
            return self
        parts = [self, *others]
        lq, lp = max(f.q_KQLD.shape[2] for f in parts), max(f.p_KPLD.shape[2] for f in parts)
        return replace(
            self,
            q_KQLD=torch.cat([pad_tokens(f.q_KQLD, 2, lq) for f in parts], 1),
            q_mask_QL=torch.cat([pad_tokens(f.q_mask_QL, 1, lq) for f in parts]),
            p_KPLD=torch.cat([pad_tokens(f.p_KPLD, 2, lp) for f in parts], 1),
            p_mask_PL=torch.cat([pad_tokens(f.p_mask_PL, 1, lp) for f in parts]),
        )

    def gathered(self, over: Gather) -> TokenFeatures:
        """See `Features`. Processes pad to their own longest passage, so they agree on the longest of all first."""
        length = over.largest(self.p_KPLD.shape[2], self.device) if self.longest is None else self.longest
        return replace(
            self,
            p_KPLD=over.along(pad_tokens(self.p_KPLD, 2, length), 1),
            p_mask_PL=over.along(pad_tokens(self.p_mask_PL, 1, length), 0),
        )


@dataclass(frozen=True)
class ScoreFeatures(Features):
    """Scores of a query's own passages: s_KQN [K, Q, N]. Such a model knows nothing of other queries' passages.

    >>> ScoreFeatures(torch.tensor([[[2.0, 1.0]]])).group_relevance(2).logits.tolist()
    [[[2.0, 1.0]]]
    """

    grouped = True
    _states = ("s_KQN",)
    s_KQN: Tensor
    scale: Scale = "none"

    def micro(self, start: int, stop: int, group_size: int) -> ScoreFeatures:
        return replace(self, s_KQN=self.s_KQN[:, start:stop])

    def group_relevance(self, group_size: int, impl: Impl = "auto") -> Relevance:
        """The scores themselves."""
        scores = self.s_KQN.float()
        return Relevance(standardised(scores) if self.scale == "standard" else scores)

    def relevance(self, mask_QP: Tensor | None = None, impl: Impl = "auto") -> Relevance:
        """Raises ValueError: see `group_relevance`."""
        raise ValueError("scores say nothing of other queries' passages: use group_relevance")

    def merged(self, others: Sequence[ScoreFeatures]) -> ScoreFeatures:
        return replace(self, s_KQN=torch.cat([f.s_KQN for f in (self, *others)], 1)) if others else self

    def gathered(self, over: Gather) -> ScoreFeatures:
        """Themselves: no query meets another process's passages."""
        return self


def standardised(logits_KQP: Tensor, mask_QP: Tensor | None = None) -> Tensor:
    """Zero mean and unit deviation over each query's unmasked passages. [K, Q, P] -> [K, Q, P]."""
    around_KQP, deviation_KQ1 = centred(logits_KQP, mask_QP)
    return around_KQP / deviation_KQ1


def pad_tokens(x: Tensor, dim: int, length: int) -> Tensor:
    """`x` with dimension `dim` padded with zeros to `length`."""
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
