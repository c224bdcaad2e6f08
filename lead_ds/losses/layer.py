"""L_lyr: LEAD's layer relevance KL, informative teacher layers first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lead_ds.losses.divergence import entropy, relevance_kl
from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.selection import selecting
from lead_ds.losses.views import Views
from lead_ds.relevance import Impl, Relevance
from lead_ds.settings.base import Temperature, Weight


class LayerSettings(LossSettings):
    """L_lyr: LEAD's layer relevance KL."""

    weight: Weight = 1.0
    teacher_temperature: Temperature = 1.0
    student_temperature: Temperature = 1.0
    layer_temperature: Temperature = 10.0
    reweight: bool = True


@dataclass(frozen=True)
class LayerKLOutput:
    """loss: scalar with gradient. per_layer, weights, nll: [K], float32, without gradient; KL and NLL in nats."""

    loss: Tensor
    per_layer: Tensor
    weights: Tensor
    nll: Tensor


def layer_relevance_kl(
    teacher: Tensor | Relevance,
    student: Tensor | Relevance,
    target: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    layer_temperature: float = 10.0,
    reweight: bool = True,
    *,
    impl: Impl = "auto",
    mean: Callable[[Tensor], Tensor] | None = None,
) -> LayerKLOutput:
    """sum_k w_k KL(t_k || s_k), with w = softmax_k(-NLL_k / layer_temperature), or w = 1 without `reweight`.

    teacher, student: relevance [K, Q, P] of paired layers, as logits or `Relevance`. target: [Q] int64 column of each
    query's positive. t_k and s_k are the softmaxes over passages of the logits over their temperatures. NLL_k is the
    teacher layer's own NLL of the positive at temperature 1. The weights carry no gradient; the targets t_k do, where
    the teacher requires it (co-training). `mean` averages the NLL [K] over processes, so that they weigh alike.

    LEAD (arXiv 2212.05225), equations of the layer-level distillation. Raises ValueError for unequal shapes.

    >>> t, s = torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)
    >>> layer_relevance_kl(t, s, torch.tensor([0])).loss.item()
    0.0
    """
    kl_K, nll_K = relevance_kl(teacher, student, target, teacher_temperature, student_temperature, impl=impl)
    if mean is not None:
        nll_K = mean(nll_K)
    weights_K = (-nll_K / layer_temperature).softmax(0) if reweight else torch.ones_like(nll_K)
    return LayerKLOutput((weights_K * kl_K).sum(), kl_K.detach(), weights_K, nll_K)


@register
class Layer(Loss):
    """L = sum_k w_k KL(t_k || s_k) of selected layer pairs k, with w = softmax_k(-NLL_k / layer_temperature): see
    `layer_relevance_kl`. One weight multiplies it with and without re-weighting. LEAD, arXiv 2212.05225.

    Statistics of each pair: kl, weights, nll, and both models' entropies in nats at the loss's temperatures, of at most
    64 queries.

    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side, Views
    >>> from lead_ds.relevance import ScoreFeatures
    >>> scores = ScoreFeatures(torch.randn(2, 3, 4))  # two layers, three queries, four passages each
    >>> views = Views(Side(scores, scores), Side(scores, scores), Scope(group_size=4))
    >>> loss = Layer(Layer.set(select="last", k=2), LossShape(ModelFacts("cross_encoder", layers=2)))
    >>> abs(loss(views)[0].item()) < 1e-6  # the models agree
    True
    """

    name, Settings, needs = "layer", selecting(LayerSettings, default="random", k=5), frozenset({"layers"})
    row = "layers"

    def forward(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, and statistics [K]."""
        settings = self.settings
        teacher, student, target_Q = views.pair("layers")
        temperatures = settings.teacher_temperature, settings.student_temperature
        output = layer_relevance_kl(
            teacher,
            student,
            target_Q,
            *temperatures,
            settings.layer_temperature,
            settings.reweight,
            impl=self.shape.impl,
            mean=views.scope.mean,
        )
        return output.loss, {
            "kl": output.per_layer,
            "weights": output.weights,
            "nll": output.nll,
            "teacher_entropy": entropy(teacher, temperatures[0]),
            "student_entropy": entropy(student, temperatures[1]),
        }
