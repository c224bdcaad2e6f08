"""The objective of a micro-batch: LEAD's losses, weighted and summed, and what each of them saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lead_ds.config import LossesConfig
from lead_ds.errors import InputError
from lead_ds.losses.attention import TextTaps, attention_loss
from lead_ds.losses.contrastive import contrastive_loss
from lead_ds.losses.divergence import entropy, shape
from lead_ds.losses.layer import layer_relevance_kl
from lead_ds.losses.margin import margin_mse
from lead_ds.losses.response import response_kl
from lead_ds.relevance import Impl, Relevance

T = TypeVar("T")


@dataclass
class Views:
    """What the objective sees of one micro-batch. Q queries of this rank, P passages in scope, K selected layer pairs.

    contrastive: the student's final relevance [1, Q, P] with the positive's column contrastive_target [Q].
    teacher_contrastive: a co-trained teacher's, over the same passages or over the common ones below.
    student, teacher: final relevance of both over common passages [1, Q, P'], the positive in column target [Q], the
    query's other `group` - 1 passages in the columns behind it. student_layers, teacher_layers: [K, Q, P'].
    attention: taps of queries and of passages (in this order), or of pairs.
    """

    contrastive: Relevance
    contrastive_target: Tensor
    teacher_contrastive: Relevance | None = None
    student: Relevance | None = None
    teacher: Relevance | None = None
    target: Tensor | None = None
    student_layers: Relevance | None = None
    teacher_layers: Relevance | None = None
    attention: Sequence[TextTaps] | None = None
    group: int | None = None


@dataclass(frozen=True)
class ObjectiveOutput:
    """loss: scalar with gradient. Everything else is detached.

    parts: each loss before its weight, by name. layer_*: [K] of the layer pairs, None without the layer loss; entropies
    in nats at the loss's temperatures, of at most 64 queries.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    layer_kl: Tensor | None = None
    layer_weights: Tensor | None = None
    layer_nll: Tensor | None = None
    teacher_entropy: Tensor | None = None
    student_entropy: Tensor | None = None


class Objective(torch.nn.Module):
    """sum of weight * loss over the losses whose weight is not 0.

    L = contrastive + response + margin_mse + layer + attention; where the teacher is co-trained (`cotrain`) also its own
    contrastive loss (L_tch) and the reverse response KL, under the weights of contrastive and response, and the
    teacher receives gradient; otherwise it receives none. One weight multiplies the layer loss with and without
    re-weighting. LEAD (arXiv 2212.05225).

    mean: averages a detached [K] tensor over the processes that share the batch, so that layer weights agree on all of
    them; None on one process. Raises InputError when every weight is 0.
    """

    def __init__(
        self,
        losses: LossesConfig,
        *,
        impl: Impl = "auto",
        cotrain: bool = False,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if losses.contrastive.weight == 0 and not losses.needs_teacher:
            raise InputError("losses", "every weight is 0, there is nothing to learn", "give one loss a weight")
        self.losses, self.impl, self.cotrain, self.mean = losses, impl, cotrain, mean

    def forward(self, views: Views) -> ObjectiveOutput:
        """Loss, parts and layer statistics of one micro-batch. Raises ValueError when a view that is needed is None."""
        losses, parts, weighted = self.losses, dict[str, Tensor](), list[Tensor]()

        def add(name: str, weight: float, value: Tensor) -> None:
            parts[name] = value.detach()
            weighted.append(weight * value)

        if losses.contrastive.weight > 0:
            self._add_contrastive(views, add)
        if losses.response.weight > 0 or losses.margin_mse.weight > 0:
            self._add_final(views, add)
        layer = None
        if losses.layer.weight > 0:
            config = losses.layer
            teacher, student = self._teacher(views.teacher_layers), _given(views.student_layers, "student_layers")
            temperatures = config.teacher_temperature, config.student_temperature
            layer = layer_relevance_kl(
                teacher,
                student,
                _given(views.target, "target"),
                *temperatures,
                config.layer_temperature,
                config.reweight,
                impl=self.impl,
                mean=self.mean,
            )
            add("layer", config.weight, layer.loss)
        if losses.attention.weight > 0:
            texts = _given(views.attention, "attention")
            add("attention", losses.attention.weight, attention_loss(texts, losses.attention, impl=self.impl))
        loss = torch.stack(weighted).sum()
        if layer is None:
            return ObjectiveOutput(loss, parts)
        return ObjectiveOutput(
            loss,
            parts,
            layer_kl=layer.per_layer,
            layer_weights=layer.weights,
            layer_nll=layer.nll,
            teacher_entropy=entropy(teacher, temperatures[0]),
            student_entropy=entropy(student, temperatures[1]),
        )

    def _add_contrastive(self, views: Views, add: Callable[[str, float, Tensor], None]) -> None:
        config = self.losses.contrastive
        own = contrastive_loss(views.contrastive, views.contrastive_target, config.temperature)
        add("contrastive", config.weight, own)
        if self.cotrain:
            teacher = _given(views.teacher_contrastive, "teacher_contrastive")
            # A model of pairs sees the query's own passages only, even where the student sees the whole batch.
            same = shape(teacher) == shape(views.contrastive)
            target = views.contrastive_target if same else _given(views.target, "target")
            taught = contrastive_loss(teacher, target, config.teacher_temperature or config.temperature)
            add("teacher_contrastive", config.weight, taught)

    def _add_final(self, views: Views, add: Callable[[str, float, Tensor], None]) -> None:
        response, margin = self.losses.response, self.losses.margin_mse
        teacher, student = self._teacher(views.teacher), _given(views.student, "student")
        target = _given(views.target, "target")
        if response.weight > 0:
            temperatures = response.teacher_temperature, response.student_temperature
            kl = response_kl(teacher, student, target, *temperatures, impl=self.impl)
            add("response", response.weight, kl)
            if self.cotrain:
                kl = response_kl(teacher, student, target, *temperatures, reverse=True, impl=self.impl)
                add("response_reverse", response.weight, kl)
        if margin.weight > 0:
            group = _given(views.group, "group")
            add("margin_mse", margin.weight, margin_mse(teacher, student, target, group, margin.teacher_scale))

    def _teacher(self, relevance: Relevance | None) -> Relevance:
        relevance = _given(relevance, "teacher")
        return relevance if self.cotrain else relevance.detach()


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"the configured losses read Views.{name}, which is None")
    return value
