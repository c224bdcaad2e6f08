"""One micro-batch: features of both models, gathered over the ranks, become the views that the objective compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lead_ds.config import Config
from lead_ds.data.reads import ModelBatch
from lead_ds.engine.distributed.gather import gather_dim, gather_passages
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.parts import Parts
from lead_ds.losses.objective import Views
from lead_ds.relevance import Features, Impl, Relevance, ScoreFeatures


@dataclass(frozen=True)
class Scope:
    """Which passages a micro-batch's queries are compared with: the rank's own, or those of every rank."""

    ranks: Ranks
    gathered: bool
    group: int
    impl: Impl
    parts: Parts

    @classmethod
    def of(cls, config: Config, ranks: Ranks, group: int, parts: Parts) -> Scope:
        return cls(ranks, config.train.in_batch == "global" and ranks.world > 1, group, config.kernels, parts)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a detached statistic over the ranks whose queries share this scope."""
        if not self.gathered:
            return x.detach()
        with self.parts.inside("communication"):
            return self.ranks.mean(x)

    def target(self, queries: int, device: torch.device) -> Tensor:
        """[Q] column of each query's positive among the passages in scope."""
        own = torch.arange(queries, device=device) * self.group
        return own + (self.ranks.rank * queries * self.group if self.gathered else 0)

    def features(self, features: Features) -> Features:
        """Features with the passages in scope."""
        if not self.gathered:
            return features
        with self.parts.inside("communication"):
            return gather_passages(features, self.ranks)

    def mask(self, passage_keys_P: Tensor, positive_keys_QM: Tensor) -> Tensor:
        """[Q, P] False where a passage in scope is a positive of the query, or its own passage again, but not its target.

        Keys are row numbers of texts, so that equal keys mean the same passage wherever it came from.
        """
        keys_P = passage_keys_P
        if self.gathered:
            with self.parts.inside("communication"):
                keys_P = gather_dim(passage_keys_P, 0)
        queries = positive_keys_QM.shape[0]
        positive_QP = torch.zeros(queries, keys_P.shape[0], dtype=torch.bool, device=keys_P.device)
        for column_Q in positive_keys_QM.T:
            positive_QP |= keys_P[None, :] == column_Q[:, None]
        target_Q = self.target(queries, keys_P.device)
        positive_QP[torch.arange(queries, device=keys_P.device), target_Q] = False
        return ~positive_QP


@dataclass(frozen=True)
class Pair:
    """Final (K = 1) and selected layers' features of one model for one micro-batch."""

    final: Features
    layers: Features | None


def make_views(
    student: Pair,
    teacher: Pair | None,
    scope: Scope,
    mask_QP: Tensor | None,
    *,
    contrastive_group: bool,
    cotrained: bool = False,
) -> Views:
    """The relevance that the objective compares.

    Where the teacher scores only a query's own passages, the student is compared on these; elsewhere on every passage in
    scope. The student's contrastive term keeps its own scope.
    """
    queries, device = student.final.queries, student.final.device
    own_target = torch.zeros(queries, dtype=torch.long, device=device)
    batch_target = scope.target(queries, device)

    def whole(features: Features) -> Relevance:
        gathered = scope.features(features)
        if isinstance(gathered, ScoreFeatures):
            return gathered.group_relevance(scope.group)
        return gathered.relevance(mask_QP, scope.impl)

    def own(features: Features) -> Relevance:
        return features.group_relevance(scope.group, scope.impl)

    grouped_student = isinstance(student.final, ScoreFeatures)
    in_group = grouped_student or (teacher is not None and isinstance(teacher.final, ScoreFeatures))
    contrastive_own = grouped_student or contrastive_group
    final_whole = None if contrastive_own and in_group else whole(student.final)
    final_own = own(student.final) if contrastive_own or in_group else None
    contrastive = final_own if contrastive_own else final_whole
    assert contrastive is not None
    views = Views(contrastive=contrastive, contrastive_target=own_target if contrastive_own else batch_target)
    if teacher is None:
        return views
    look = own if in_group else whole
    views.group = scope.group
    views.target = own_target if in_group else batch_target
    views.student = final_own if in_group else final_whole
    views.teacher = look(teacher.final)
    if student.layers is not None and teacher.layers is not None:
        views.student_layers, views.teacher_layers = look(student.layers), look(teacher.layers)
    if not cotrained:
        return views
    # A co-trained teacher's own likelihood is over what it can score: its group, or the student's contrastive scope.
    teacher_own = contrastive_own or isinstance(teacher.final, ScoreFeatures)
    views.teacher_contrastive = own(teacher.final) if teacher_own else whole(teacher.final)
    return views


def word_groups(teacher: ModelBatch, student: ModelBatch, device: torch.device) -> list[tuple[Tensor, Tensor] | None]:
    """The token groups of queries and of passages that both models' attention is compared by; None where tokens are equal."""
    groups: list[tuple[Tensor, Tensor] | None] = []
    for t, s in ((teacher.queries, student.queries), (teacher.passages, student.passages)):
        known = t is not None and s is not None and "groups" in t and "groups" in s
        groups.append((t["groups"].to(device), s["groups"].to(device)) if known and t and s else None)
    return groups
