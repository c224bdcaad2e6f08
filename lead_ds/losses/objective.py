"""The objective of a micro-batch: the losses of a run, weighted and summed, and what each of them saw.

With several teachers a loss is a sum of terms, one for each teacher that feeds it: a loss of its own, times the teacher's
share. Its weights, such as a linear map, are its own too. The gradient of such a sum of KLs, or of squared errors, is that of
the teachers' mean. A term may also read several teachers as one: see `mixture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.losses.loss import LOSSES, Loss, Losses, LossShape, ModelFacts
from lead_ds.losses.matryoshka import Change, check_widths, first, mean_over
from lead_ds.losses.mixture import together
from lead_ds.losses.quantised import held_in
from lead_ds.losses.selection import NO_LAYERS, Layers
from lead_ds.losses.views import Views
from lead_ds.relevance import Features


class Captured(NamedTuple):
    """The layers that a model must give for a step: their features, and their attention taps."""

    layers: Sequence[int] = ()
    taps: Sequence[int] = ()


NOTHING = Captured()


@dataclass(frozen=True)
class Asked:
    """What a step compares: the layers of each term of the objective, and what the models must therefore give.

    step: its number, from 0. terms: those that count at it; None: all. The teachers that teach decide them, and their shares.
    """

    pairs: Mapping[str, Layers]
    student: Captured = NOTHING
    teachers: Sequence[Captured] = (NOTHING,)
    step: int = 0
    terms: Sequence[Term] | None = None


NOTHING_ASKED = Asked({})


@dataclass(frozen=True)
class ObjectiveOutput:
    """loss: scalar with gradient. Everything else is detached.

    parts: scalars by name, each loss before its weight among them. layers: vectors [K] of layer pairs, by the row of
    metrics.jsonl that they stand in and by name.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    layers: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Taught:
    """A teacher as the objective knows it: what it is, how much it counts, and the losses that it feeds."""

    facts: ModelFacts
    losses: frozenset[str]
    weight: float = 1.0


@dataclass(frozen=True)
class Term:
    """One summand: a loss, the teachers that it reads, their shares (together 1), and its own share of the loss.

    suffix: tells it from the loss's other terms. how: several teachers are read as one.
    """

    loss: str
    teachers: Sequence[int] = (0,)
    shares: Sequence[float] = (1.0,)
    share: float = 1.0
    suffix: str = ""
    how: Literal["alone", "mixed", "concatenated"] = "alone"

    @property
    def key(self) -> str:
        """Its name: the loss's, where there is one term of it."""
        return self.loss + self.suffix


def terms_of(losses: Losses, taught: Sequence[Taught], relevance: str = "weight", vectors: str = "fold") -> list[Term]:
    """The terms of the losses with a weight. relevance, vectors: see `MixConfig`.

    Raises InputError for layers that would have to be concatenated.
    """
    found: list[Term] = []
    for name, (loss, settings) in losses.active.items():
        needs = loss.reads(settings) - {"labels"}
        feeding = [place for place, teacher in enumerate(taught) if name in teacher.losses]
        if not needs or len(feeding) < 2:
            found.append(Term(name, feeding or (0,)))
            continue
        whole = sum(taught[place].weight for place in feeding)
        shares = [taught[place].weight / whole for place in feeding]
        if needs == {"final"} and relevance == "nll":
            found.append(Term(name, feeding, shares, how="mixed"))
        elif "features" in needs and vectors == "concatenate":
            if not needs <= {"final", "features"}:
                what = f"losses.{name} compares layers, and those of several teachers are not concatenated"
                raise InputError("mix.vectors", what, "set it to fold, or compare no layers")
            found.append(Term(name, feeding, shares, how="concatenated"))
        else:
            each = zip(feeding, shares, strict=True)
            found += [Term(name, (place,), share=share, suffix=f":{place}") for place, share in each]
    return found


class Objective(nn.ModuleDict):
    """sum of weight * share * loss over the terms of the losses whose weight is not 0. The modules live here, by key.

    shape: of the models, with the only teacher. taught: the teachers, where they are known; see `terms_of`. Where the
    student's vectors are trained at several widths, or to be quantised, each loss that reads them is its mean over these.
    Raises InputError when every weight is 0, and for widths that the student's vectors do not have.
    """

    def __init__(
        self,
        losses: Losses,
        shape: LossShape,
        taught: Sequence[Taught] = (),
        relevance: str = "weight",
        vectors: str = "fold",
    ) -> None:
        terms = terms_of(losses, taught, relevance, vectors)
        super().__init__({term.key: _made(losses, term, shape, taught) for term in terms})
        self.terms, self.shape = terms, shape
        self.weights = [teacher.weight for teacher in taught] or [1.0]
        if shape.dims:
            check_widths(shape.dims, shape.student.width)
        self.changes = changes_of(shape)
        if not len(self):
            raise InputError("losses", "every weight is 0, there is nothing to learn", "give one loss a weight")

    def asked(
        self, pairs: Sequence[Mapping[str, Layers]], step: int = 0, teaching: Sequence[int] | None = None
    ) -> Asked:
        """What the models must give at a step for losses that compare the layers `pairs`, by teacher and loss.

        teaching: the teachers, by place, that teach at it; None: all.
        """
        terms = self.terms if teaching is None else self.terms_of(teaching)
        chosen = {
            term.key: pairs[term.teachers[0]][term.loss]
            for term in terms
            if term.how == "alone" and pairs and term.loss in pairs[term.teachers[0]]
        }

        read_by = [[term.key for term in terms if place in term.teachers] for place in range(len(self.weights))]
        teachers = [self._captured(chosen, 0, keys) for keys in read_by]
        return Asked(chosen, self._captured(chosen, 1, list(chosen)), teachers, step, terms)

    def terms_of(self, teaching: Sequence[int]) -> list[Term]:
        """The terms that count where some of the teachers teach, each with its share of its loss among those that do."""
        if len(teaching) == len(self.weights):
            return self.terms
        found: list[Term] = []
        for term in self.terms:
            if not self._loss(term.key).needs - {"labels"}:
                found.append(term)
            elif places := [place for place in term.teachers if place in teaching]:
                feeding = {place for one in self.terms if one.loss == term.loss for place in one.teachers}
                whole = sum(self.weights[place] for place in feeding.intersection(teaching))
                shares = [self.weights[place] / whole for place in places]
                now = {"shares": shares} if len(term.teachers) > 1 else {"share": shares[0]}
                found.append(replace(term, teachers=places, **now))
        return found

    def rows(self, asked: Asked) -> dict[str, Layers]:
        """The layers compared, by the row of metrics.jsonl in which statistics of them stand."""
        return {self._row(term): asked.pairs[term.key] for term in self.terms if term.key in asked.pairs}

    def forward(self, views: Sequence[Views], asked: Asked) -> ObjectiveOutput:
        """Loss, parts and layer statistics of one micro-batch, whose `views`, by teacher, hold the requested layers."""
        weighted, parts, layers = list[Tensor](), dict[str, Tensor](), dict[str, dict[str, Tensor]]()
        terms = self.terms if asked.terms is None else asked.terms
        counting = {term.key for term in terms}
        idle = [loss for term, loss in self.losses() if term.key not in counting]
        weighted += [_idle(loss) for loss in idle if next(loss.parameters(), None) is not None]
        for term in terms:
            loss = self._loss(term.key)
            value, statistics = self._said(term, self._views(term, views, asked))
            weighted.append(loss.settings.weight * loss.strength(asked.step) * term.share * value)
            if term.suffix:
                parts[term.loss] = parts.get(term.loss, 0.0) + term.share * value.detach()
            parts |= {term.key: value.detach()}
            parts |= {key + term.suffix: x.detach() for key, x in statistics.items() if x.dim() == 0}
            vectors = {key: x.detach() for key, x in statistics.items() if x.dim() > 0}
            if vectors:
                layers[self._row(term)] = vectors
        return ObjectiveOutput(torch.stack(weighted).sum(), parts, layers)

    def _captured(self, chosen: Mapping[str, Layers], side: int, keys: Sequence[str]) -> Captured:
        """The layers of the terms `keys`, each once, in order of first appearance."""
        found: list[list[int]] = []
        for need in ("layers", "attention"):
            meant = [key for key in keys if key in chosen and need in self._loss(key).needs]
            found.append(list(dict.fromkeys(layer for key in meant for layer in chosen[key][side])))
        return Captured(*found)

    def losses(self) -> Iterator[tuple[Term, Loss]]:
        """Every term, and its loss."""
        return ((term, self._loss(term.key)) for term in self.terms)

    def _said(self, term: Term, views: Views) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A term's loss, and its statistics; the mean over widths where it reads vectors."""
        loss = self._loss(term.key)

        def said(views: Views) -> tuple[Tensor, Mapping[str, Tensor]]:
            found = loss(views)
            return found if isinstance(found, tuple) else (found, {})

        if self.changes and loss.needs != {"attention"}:  # which reads tokens' maps, not vectors
            return mean_over(said, term.loss, views, self.changes)
        return said(views)

    def _views(self, term: Term, views: Sequence[Views], asked: Asked) -> Views:
        if term.how != "alone":
            return together([views[place] for place in term.teachers], term.shares, term.how)
        held = asked.teachers[term.teachers[0]].layers, asked.student.layers
        return views[term.teachers[0]].of_layers(asked.pairs.get(term.key, NO_LAYERS), held)

    def _row(self, term: Term) -> str:
        return (self._loss(term.key).row or term.loss) + term.suffix

    def _loss(self, key: str) -> Loss:
        loss = self[key]
        assert isinstance(loss, Loss)
        return loss


def _idle(loss: Loss) -> Tensor:
    """0, with a gradient of zeros for the weights of a loss that does not count: ZeRO-3 would keep their last one.

    It would be clipped together with the others'. In the module's own forward, where ZeRO-3 has gathered them.
    """

    def nothing() -> Tensor:
        return torch.stack([x.sum() for x in loss.parameters()]).sum() * 0.0

    loss.forward = nothing  # type: ignore[assignment]
    try:
        return loss()  # type: ignore[no-any-return]
    finally:
        del loss.forward


def _made(losses: Losses, term: Term, shape: LossShape, taught: Sequence[Taught]) -> Loss:
    """The module of a term, for the teachers that it reads."""
    if taught:
        read = [taught[place].facts for place in term.teachers]
        facts = read[0]
        if term.how == "concatenated":
            facts = replace(facts, width=sum(one.width or 0 for one in read))
        shape = replace(shape, teacher=facts)
    return LOSSES[term.loss](getattr(losses, term.loss), shape)  # type: ignore[abstract]


def changes_of(shape: LossShape) -> dict[str, Change]:
    """What the student's vectors are trained as, beside as they are: narrower, in fewer bits, or both."""
    unit, how = shape.student.unit, shape.quantize
    found = {f"@{dim}": first(dim, unit=unit) for dim in shape.dims[:-1]}
    if how is None:
        return found
    held = held_in(how)
    both = {f"{label}@{how}": partial(_in_turn, change, held) for label, change in found.items()}
    return {**found, **both, f"@{how}": held}


def _in_turn(change: Change, then: Change, features: Features) -> Features:
    return then(change(features))
