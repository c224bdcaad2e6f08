"""What a loss sees of one micro-batch: what both models gave, and the relevance that follows, computed when first read.

Dimensions: K layers, Q queries of this process, P passages in scope, N passages of a query's own group, B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lead_ds.relevance import Features, Impl, Relevance, VectorFeatures

Who = Literal["student", "teacher"]
What = Literal["final", "layers"]
Passages = Literal["scope", "group"]
T = TypeVar("T")


class Groups(NamedTuple):
    """[B, Lt] and [B, Ls]: the groups of the teacher's and of the student's tokens; slots: more than their largest number."""

    teacher: Tensor
    student: Tensor
    slots: int


class Tap(Protocol):
    """What one layer's attention read: q [B, H, L, d], k (fewer heads: grouped queries), mask [B, L] (1: a token).

    causal: later keys are hidden; band: so are keys farther than that many positions (None: none).
    """

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def causal(self) -> bool: ...
    @property
    def band(self) -> int | None: ...


@dataclass(frozen=True)
class Side:
    """One model's answer for a micro-batch: final features (K = 1), those of selected layers, and attention taps by layer.

    taps_passages: of passages, or of pairs where the model reads pairs; it then has none of queries.
    """

    final: Features
    layers: Features | None = None
    taps_queries: Mapping[int, Tap] | None = None
    taps_passages: Mapping[int, Tap] | None = None

    def detach(self) -> Side:
        """Features without gradient."""
        return self.mapped(lambda features: features.detach())

    def asking(self, other: Side) -> Side:
        """Its queries with the other's passages, which carry no gradient: at length 1 where the other compares by cosine, as its
        index holds them. Both are vectors of one width."""
        own, theirs = self.final, other.final
        assert isinstance(own, VectorFeatures)
        assert isinstance(theirs, VectorFeatures)
        p_KPD = theirs.p_KPD.detach()
        if theirs.scale == "cosine":
            p_KPD = normalize(p_KPD.float(), dim=-1)
        return replace(self, final=replace(own, p_KPD=p_KPD.to(own.q_KQD)))

    def mapped(self, change: Callable[[Features], Features]) -> Side:
        """With `change` of its features."""
        return replace(self, final=change(self.final), layers=None if self.layers is None else change(self.layers))


@dataclass(frozen=True)
class Scope:
    """The passages that a micro-batch's queries are compared with. Here: those of this process's micro-batch.

    group_size: N. impl: of the kernels.
    """

    group_size: int
    impl: Impl = "auto"

    def begin(self) -> None:
        """The models have answered, and losses are computed from here on."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a detached statistic over the processes whose queries share this scope."""
        return x.detach()

    def target(self, queries: int, device: torch.device) -> Tensor:
        """[Q] column of each query's positive among the passages in scope."""
        return torch.arange(queries, device=device) * self.group_size

    def gathered(self, features: Features) -> Features:
        """Features with the passages in scope."""
        return features

    def mask(self, passage_keys_P: Tensor, positive_keys_QM: Tensor) -> Tensor:
        """[Q, P] False where a passage in scope is a positive of the query, or its own passage again, but not its target.

        Keys are row numbers of texts, so that equal keys mean the same passage wherever it came from.
        """
        keys_P = self.gathered_keys(passage_keys_P)
        queries = positive_keys_QM.shape[0]
        positive_QP = torch.zeros(queries, keys_P.shape[0], dtype=torch.bool, device=keys_P.device)
        for column_Q in positive_keys_QM.T:
            positive_QP |= keys_P[None, :] == column_Q[:, None]
        target_Q = self.target(queries, keys_P.device)
        positive_QP[torch.arange(queries, device=keys_P.device), target_Q] = False
        return ~positive_QP

    def gathered_keys(self, keys_P: Tensor) -> Tensor:
        """Keys of the passages in scope."""
        return keys_P


@dataclass
class Views:
    """One micro-batch as a loss sees it: a student, and the teacher that it is compared with (None: labels alone).

    student, teacher: raw features and taps, local to this process (`views.student.final`); a frozen teacher's carry no
    gradient. scope: which passages relevance is over. keys: of passages [Q * N] and of positives [Q, M], where duplicates
    are masked. cotrained: the teacher learns too. groups: token groups of queries and of passages, where tokenizers differ.
    compared: the teacher's and the student's layers in `layers`, by number, paired in order.

    >>> from lead_ds.relevance import ScoreFeatures
    >>> views = Views(Side(ScoreFeatures(torch.tensor([[[2.0, 1.0]]]))), None, Scope(group_size=2))
    >>> views.relevance("student", passages="group").logits.tolist(), views.target("group").tolist()
    ([[[2.0, 1.0]]], [0])
    """

    student: Side
    teacher: Side | None
    scope: Scope
    keys: tuple[Tensor, Tensor] | None = None
    cotrained: bool = False
    groups: Sequence[Groups | None] = (None, None)
    compared: tuple[Sequence[int], Sequence[int]] = ((), ())
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)
    _layers: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.teacher is not None and not self.cotrained:
            self.teacher = self.teacher.detach()

    def relevance(self, who: Who, what: What = "final", passages: Passages = "scope") -> Relevance:
        """Relevance [K, Q, P] over every passage in scope, or [K, Q, N] over a query's own.

        Every process must ask for the same, in the same order: what is in scope is gathered.
        """

        def compute() -> Relevance:
            if passages == "group":
                return self._features(who, what).group_relevance(self.scope.group_size, self.scope.impl)
            return self._gathered(who, what).relevance(self.mask, self.scope.impl)

        return self._once((who, what, passages), compute)

    def target(self, passages: Passages = "scope") -> Tensor:
        """[Q] int64 column of each query's positive in a relevance over these passages."""
        queries, device = self.student.final.queries, self.student.final.device
        if passages == "group":
            return torch.zeros(queries, dtype=torch.long, device=device)
        return self.scope.target(queries, device)

    @property
    def common(self) -> Passages:
        """Over which passages both models can be compared: a model of pairs knows only of a query's own."""
        grouped = self.student.final.grouped or _given(self.teacher, "teacher").final.grouped
        return "group" if grouped else "scope"

    def pair(self, what: What = "final") -> tuple[Relevance, Relevance, Tensor]:
        """The teacher's and the student's relevance over common passages, [K, Q, P] each, and the positives' columns [Q]."""
        passages = self.common
        return (
            self.relevance("teacher", what, passages),
            self.relevance("student", what, passages),
            self.target(passages),
        )

    @property
    def mask(self) -> Tensor | None:
        """[Q, P] False where a passage in scope must not count as a negative of the query."""
        keys = self.keys
        return None if keys is None else self._once(("mask",), lambda: self.scope.mask(*keys))

    def of_layers(
        self, compared: tuple[Sequence[int], Sequence[int]], held: tuple[Sequence[int], Sequence[int]]
    ) -> Views:
        """The same with the layers `compared` alone, teacher's and student's, of those that are `held`; empty: with none."""
        teacher, student = (
            None if side is None else replace(side, layers=_at(side.layers, layers, those))
            for side, layers, those in zip((self.teacher, self.student), compared, held, strict=True)
        )
        assert student is not None
        return replace(self, student=student, teacher=teacher, compared=compared, _layers={})

    def mapped(self, change: Callable[[Features], Features]) -> Views:
        """The same with `change` of the student's features, such as their first dimensions: how losses wrap losses.

        `change` must treat each vector by itself. What the teacher gave is not computed again.
        """
        own = {part.name: getattr(self, part.name) for part in fields(Views)}
        return _Mapped(**{**own, "student": self.student.mapped(change)}, source=self, change=change)

    def beside(self, teacher: Side | None, groups: Sequence[Groups | None] = (None, None)) -> Views:
        """The same student with another teacher; what is known of the student's final state is not computed again."""
        own = {part.name: getattr(self, part.name) for part in fields(Views) if part.init}
        own |= {"teacher": teacher, "groups": groups, "_known": {}, "_layers": {}}
        return _Beside(**own, source=self)

    def _features(self, who: Who, what: What) -> Features:
        side = _given(self.student if who == "student" else self.teacher, who)
        return _given(side.final if what == "final" else side.layers, f"{who}.{what}")

    def _gathered(self, who: Who, what: What) -> Features:
        return self._once((who, what, "gathered"), lambda: self.scope.gathered(self._features(who, what)))

    def _once(self, key: tuple[str, ...], compute: Callable[[], T]) -> T:
        known = self._layers if "layers" in key else self._known
        if key not in known:
            known[key] = compute()
        return known[key]


@dataclass
class _Beside(Views):
    """Views of another teacher; the student's final side, and what is masked, are the source's."""

    source: Views = field(kw_only=True)

    @property
    def mask(self) -> Tensor | None:
        return self.source.mask

    def _gathered(self, who: Who, what: What) -> Features:
        shared = who == "student" and what == "final"
        return self.source._gathered(who, what) if shared else super()._gathered(who, what)

    def relevance(self, who: Who, what: What = "final", passages: Passages = "scope") -> Relevance:
        shared = who == "student" and what == "final"
        return self.source.relevance(who, what, passages) if shared else super().relevance(who, what, passages)


@dataclass
class _Mapped(Views):
    """Views whose student is changed; the teacher's side is the source's."""

    source: Views = field(kw_only=True)
    change: Callable[[Features], Features] = field(kw_only=True)

    def __post_init__(self) -> None:
        self._known, self._layers = {}, {}

    def _gathered(self, who: Who, what: What) -> Features:
        gathered = self.source._gathered(who, what)
        return gathered if who == "teacher" else self._once((who, what, "gathered"), lambda: self.change(gathered))

    @property
    def mask(self) -> Tensor | None:
        return self.source.mask

    @property
    def common(self) -> Passages:
        return self.source.common

    def relevance(self, who: Who, what: What = "final", passages: Passages = "scope") -> Relevance:
        own = who == "student"
        return super().relevance(who, what, passages) if own else self.source.relevance(who, what, passages)


def _at(features: Features | None, layers: Sequence[int], held: Sequence[int]) -> Features | None:
    if features is None or not layers or not all(layer in held for layer in layers):
        return None
    return features.at([held.index(layer) for layer in layers])


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"a loss reads Views.{name}, which is None")
    return value
