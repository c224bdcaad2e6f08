"""Which layers are compared at a step: one section for each way. Layer i is the output of transformer layer i."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from lead_ds.errors import InputError
from lead_ds.settings.base import NonNegative, Positive, Section
from lead_ds.settings.modes import in_modes

Layers = tuple[list[int], list[int]]
"""Indices of the teacher's and of the student's layers, paired in order."""

NO_LAYERS: Layers = ([], [])
_STORE = "store more: lead-ds teach CONFIG --vectors LAYERS, in a new folder"


@dataclass(frozen=True)
class Depths:
    """The models whose layers are to be paired: how many each has, the run's seed, and what limits the teacher's.

    informative: the teacher's layers that know the positive (see `informative_layers`). readable: those that a cache
    holds, if not all.
    """

    teacher: int
    student: int
    seed: int = 0
    informative: Sequence[int] = ()
    readable: Sequence[int] | None = None


class Selection(Section):
    """A way to select layers. `key` is where its settings stand, such as `losses.layer`."""

    select: Any

    @abstractmethod
    def pair(self, key: str, models: Depths, step: int) -> Layers:
        """The layers compared at `step`, sorted and paired in order; LEAD (arXiv 2212.05225), layer selection.

        Raises InputError when k or a given index exceeds a model's layers, k the informative or stored ones, and for a
        layer that is not stored.
        """

    def deepest(self, teacher_layers: int) -> int:
        """How many of the teacher's first layers can be selected from."""
        return teacher_layers

    @abstractmethod
    def reach(self, key: str, teacher_layers: int) -> list[int]:
        """The teacher's layers that may be selected at one step or another, ascending. Raises as `pair`."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Pairs that are compared at a step."""


class _Counted(Selection):
    """k layers of each model."""

    k: Positive

    def reach(self, key: str, teacher_layers: int) -> list[int]:
        """See `Selection`. The student's depth is not at issue."""
        return self.pair(key, Depths(teacher_layers, teacher_layers), step=0)[0]

    @property
    def count(self) -> int:
        return self.k

    def _fits(self, key: str, models: Depths) -> None:
        least = min(models.teacher, models.student)
        if self.k > least:
            what = f"{self.k} layers are to be selected, the teacher has {models.teacher}, the student {models.student}"
            raise InputError(f"{key}.k", what, f"use at most {least}")


class Last(_Counted):
    """The last k layers of each model."""

    select: Literal["last"] = "last"

    def pair(self, key: str, models: Depths, step: int) -> Layers:
        self._fits(key, models)
        teacher, student = (list(range(count - self.k, count)) for count in (models.teacher, models.student))
        check_stored(f"{key}.select", teacher, models.readable)
        return teacher, student


class Skip(_Counted):
    """k evenly spaced layers of each model, the last among them."""

    select: Literal["skip"] = "skip"

    def pair(self, key: str, models: Depths, step: int) -> Layers:
        self._fits(key, models)
        k = self.k
        teacher, student = ([(i + 1) * n // k - 1 for i in range(k)] for n in (models.teacher, models.student))
        check_stored(f"{key}.select", teacher, models.readable)
        return teacher, student


class Random(_Counted):
    """k layers of each model, drawn without replacement from (seed, step) alone: equal on every rank, and after a resume.

    Of a teacher whose vectors were cached, among the layers that are stored.
    """

    select: Literal["random"] = "random"
    every: Positive = Field(10, description="steps between two draws")

    def pair(self, key: str, models: Depths, step: int) -> Layers:
        self._fits(key, models)
        draw = f"{key} {models.seed} {step // self.every}"
        teacher = drawn(self.among(key, models), self.k, f"{draw} teacher")
        return teacher, drawn(range(models.student), self.k, f"{draw} student")

    def reach(self, key: str, teacher_layers: int) -> list[int]:
        return list(range(teacher_layers))

    def among(self, key: str, models: Depths) -> Sequence[int]:
        """The teacher's layers that are drawn from."""
        stored = models.readable
        if stored is None:
            return range(models.teacher)
        if self.k > len(stored):
            what = f"{self.k} layers are to be selected at random, the cache holds {len(stored)}: {_listed(stored)}"
            raise InputError(f"{key}.k", what, f"use at most {len(stored)}, or {_STORE}" if stored else _STORE)
        return stored


class Informative(Random):
    """As random, of the teacher's layers whose own NLL of the positive is below chance.

    The NLL is what the teacher's tuned lens was measured at, else measured at start.
    """

    select: Literal["informative"] = "informative"  # type: ignore[assignment]
    informative_margin: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="nats by which the NLL is below chance, log N"
    )

    def among(self, key: str, models: Depths) -> Sequence[int]:
        if self.k > len(models.informative):
            what = f"{self.k} layers are to be selected, {len(models.informative)} of the teacher's are informative"
            remedy = f"lower it, or {key}.informative_margin, or fit a lens: lead-ds fit-lens CONFIG"
            raise InputError(f"{key}.k", what, remedy)
        return models.informative


class Given(Selection):
    """Layers by number, paired in order."""

    select: Literal["given"] = "given"
    teacher_layers: list[NonNegative] = Field(min_length=1)
    student_layers: list[NonNegative] = Field(min_length=1)

    @model_validator(mode="after")
    def _paired(self) -> Given:
        if len(self.teacher_layers) != len(self.student_layers):
            raise ValueError("teacher_layers and student_layers are paired in order and must be equally many")
        return self

    def pair(self, key: str, models: Depths, step: int) -> Layers:
        chosen = list(self.teacher_layers), list(self.student_layers)
        for who, layers, count in zip(("teacher", "student"), chosen, (models.teacher, models.student), strict=True):
            check_given(f"{key}.{who}_layers", who, layers, count)
        check_stored(f"{key}.teacher_layers", chosen[0], models.readable)
        return chosen

    def reach(self, key: str, teacher_layers: int) -> list[int]:
        check_given(f"{key}.teacher_layers", "teacher", self.teacher_layers, teacher_layers)
        return sorted(set(self.teacher_layers))

    @property
    def count(self) -> int:
        return len(self.teacher_layers)

    def deepest(self, teacher_layers: int) -> int:
        return min(teacher_layers, 1 + max(self.teacher_layers))


WAYS: Mapping[str, type[Selection]] = {
    "random": Random,
    "last": Last,
    "skip": Skip,
    "given": Given,
    "informative": Informative,
}


def selecting(settings: type[Section], default: str, k: int, ways: Sequence[str] = tuple(WAYS)) -> Any:
    """The annotation of a loss's settings that select layers: `settings`, once with each of `ways`.

    `default`: where no `select` is given; `k`: its default.
    """
    modes: dict[str, type[Section]] = {}
    for way in ways:
        count: dict[str, Any] = {"k": (Positive, k)} if issubclass(WAYS[way], _Counted) else {}
        modes[way] = create_model(
            f"{WAYS[way].__name__}{settings.__name__}",
            __base__=(settings, WAYS[way]),
            __module__=settings.__module__,
            __doc__=f"{settings.__doc__}\n\n{WAYS[way].__doc__}",
            **count,
        )
    return in_modes("select", default, modes)


def informative_layers(nll: Sequence[float], chance: float, margin: float) -> list[int]:
    """The layers whose NLL of the positive is below chance (log N, of N passages) by at least `margin` nats."""
    return [layer for layer, value in enumerate(nll) if value <= chance - margin]


def drawn(layers: Sequence[int], k: int, seed: str) -> list[int]:
    """k of `layers`, sorted; a string seed is hashed: the same on every machine."""
    return [layers[place] for place in sorted(random.Random(seed).sample(range(len(layers)), k))]


def check_given(where: str, who: str, layers: Sequence[int], count: int) -> None:
    """Raise InputError for a layer that a model of `count` layers lacks."""
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        raise InputError(where, f"layer {beyond[0]} is beyond the {who}'s {count} layers", f"use 0 to {count - 1}")


def check_stored(where: str, layers: Sequence[int], stored: Sequence[int] | None) -> None:
    """Raise InputError for a layer that a cache does not hold."""
    missing = [] if stored is None else [layer for layer in layers if layer not in stored]
    if missing:
        raise InputError(where, f"reads layer {missing[0]}, the cache holds layers {_listed(stored or [])}", _STORE)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
