"""L_rep: the student's final relevance drawn to the teacher's."""

from __future__ import annotations

from torch import Tensor

from lead_ds.losses.divergence import relevance_kl
from lead_ds.losses.loss import Loss, LossSettings, register
from lead_ds.losses.views import Views
from lead_ds.relevance import Impl, Relevance
from lead_ds.settings.base import Temperature, Weight


class ResponseSettings(LossSettings):
    """L_rep: KL(teacher || student) of the final relevance."""

    weight: Weight = 1.0
    teacher_temperature: Temperature = 1.0
    student_temperature: Temperature = 1.0


def response_kl(
    teacher: Relevance,
    student: Relevance,
    target_Q: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    reverse: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """KL(teacher || student) of the final distributions; with `reverse`, KL(student || teacher).

    teacher, student: [1, Q, P] over common passages; each keeps its own temperature in either direction. Gradient goes
    to every argument that requires it: LEAD (arXiv 2212.05225) adds the reverse where the teacher is co-trained.
    Returns a float32 scalar, nats, averaged over queries.
    """
    if reverse:
        kl_K, _ = relevance_kl(student, teacher, target_Q, student_temperature, teacher_temperature, impl=impl)
    else:
        kl_K, _ = relevance_kl(teacher, student, target_Q, teacher_temperature, student_temperature, impl=impl)
    return kl_K[0]


@register
class Response(Loss):
    """L = mean_q KL(softmax_p(t(q, p) / teacher_temperature) || softmax_p(s(q, p) / student_temperature)), in nats.

    Over the passages that both models score: of the batch, or, where one reads pairs, of the query's group. Where the
    teacher is co-trained, KL(student || teacher) is added. Statistics: response, response_reverse. LEAD, arXiv 2212.05225.

    >>> import torch
    >>> from lead_ds.losses import LossShape, ModelFacts, Scope, Side, Views
    >>> from lead_ds.relevance import ScoreFeatures
    >>> student, teacher = (Side(ScoreFeatures(torch.tensor(scores)[None, None])) for scores in ([0.0, 0.0], [0.0, 1.0986]))
    >>> loss = Response(Response.set(), LossShape(ModelFacts("cross_encoder", layers=3)))
    >>> round(loss(Views(student, teacher, Scope(group_size=2)))[0].item(), 4)  # (1/4, 3/4) against (1/2, 1/2)
    0.1308
    """

    name, Settings, needs = "response", ResponseSettings, frozenset({"final"})

    def forward(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, and the KL of each direction."""
        relevance, settings, impl = views.pair(), self.settings, self.shape.impl
        temperatures = settings.teacher_temperature, settings.student_temperature
        forward = response_kl(*relevance, *temperatures, impl=impl)
        if not views.cotrained:
            return forward, {}
        reverse = response_kl(*relevance, *temperatures, reverse=True, impl=impl)
        return forward + reverse, {"response": forward.detach(), "response_reverse": reverse.detach()}
