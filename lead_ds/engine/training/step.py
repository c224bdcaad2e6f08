"""One micro-batch: what the trained module is given of it, and the passages of every rank that its queries meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lead_ds.data.reads import ModelBatch
from lead_ds.engine.distributed.gather import AllRanks, gather_dim
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.phases import Phases
from lead_ds.engine.training.lengths import Longest
from lead_ds.losses.objective import NOTHING_ASKED, Asked
from lead_ds.losses.views import Groups, Scope, Side
from lead_ds.models.scorer import Output
from lead_ds.relevance import Features, Impl, TokenFeatures
from lead_ds.teachers.teacher import TeacherView


@dataclass(frozen=True)
class RankScope(Scope):
    """The scope of a rank: its own passages, or, where `gathers`, those of every rank."""

    ranks: Ranks | None = None
    gathers: bool = False
    phases: Phases = Phases()  # noqa: RUF009  # immutable: hears nothing

    @classmethod
    def of(cls, in_batch: str, ranks: Ranks, group_size: int, impl: Impl, phases: Phases) -> RankScope:
        """The scope of `train.in_batch`."""
        return cls(group_size, impl, ranks, in_batch == "global" and ranks.world > 1, phases)

    def begin(self) -> None:
        self.phases.at("losses")

    def mean(self, x: Tensor) -> Tensor:
        if not self.gathers or self.ranks is None:
            return x.detach()
        with self.phases.inside("communication"):
            return self.ranks.mean(x)

    def target(self, queries: int, device: torch.device) -> Tensor:
        own = super().target(queries, device)
        return own + self.ranks.rank * queries * self.group_size if self.gathers and self.ranks else own

    def gathered(self, features: Features) -> Features:
        if not self.gathers:
            return features
        with self.phases.inside("communication"):
            return features.gathered(AllRanks())

    def gathered_keys(self, keys_P: Tensor) -> Tensor:
        if not self.gathers:
            return keys_P
        with self.phases.inside("communication"):
            return gather_dim(keys_P, 0)


@dataclass(frozen=True)
class Micro:
    """One micro-batch, on the device, as the trained module takes it.

    taught: the output for it of each teacher that is not trained, None of one that does not teach now. teacher: the texts of
    one that is. keys: where duplicates are masked. groups: of each teacher, see `Views`. longest: see `Lengths`.
    """

    student: ModelBatch
    scope: Scope
    asked: Asked = NOTHING_ASKED
    taught: Sequence[Side | None] = ()
    teacher: ModelBatch | None = None
    keys: tuple[Tensor, Tensor] | None = None
    groups: Sequence[tuple[Groups | None, ...]] = ((None, None),)
    longest: Longest = ()


def agreed(found: Side, longest: int | None) -> Side:
    """A model's answer with the tokens that all ranks pad its passages to, where they have agreed on it."""
    if longest is None or not isinstance(found.final, TokenFeatures):
        return found
    layers = replace(found.layers, longest=longest) if isinstance(found.layers, TokenFeatures) else found.layers
    return replace(found, final=replace(found.final, longest=longest), layers=layers)


def side(output: Output) -> Side:
    """A model's answer as losses see it."""
    return Side(output.final, output.layers, output.taps_queries, output.taps_passages)


def side_of(view: TeacherView, micro: int, queries: slice, group_size: int) -> Side:
    """A frozen teacher's answer for a window, of its micro-batch number `micro`, which has these queries."""
    first, last, layers = queries.start, queries.stop, view.layers
    taps = side(view.outputs[micro]) if view.outputs else None
    return Side(
        view.final.micro(first, last, group_size),
        None if layers is None else layers.micro(first, last, group_size),
        None if taps is None else taps.taps_queries,
        None if taps is None else taps.taps_passages,
    )


def word_groups(teacher: ModelBatch, student: ModelBatch, device: torch.device) -> tuple[Groups | None, ...]:
    """The token groups of queries and of passages that both models' attention is compared by; None where tokens are equal."""
    found: list[Groups | None] = []
    for t, s in ((teacher.queries, student.queries), (teacher.passages, student.passages)):
        if t is None or s is None or "groups" not in t or "groups" not in s:
            found.append(None)
            continue
        groups = t["groups"], s["groups"]  # counted here, where they lie on the host: a GPU would be waited for
        slots = 1 + max(int(numbers.max()) for numbers in groups)
        of_teacher, of_student = (numbers.to(device, non_blocking=True) for numbers in groups)
        found.append(Groups(of_teacher, of_student, slots))
    return tuple(found)
