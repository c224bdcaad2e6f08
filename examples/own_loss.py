"""A loss of your own, with weights: the student's vectors, mapped into the teacher's space, against the teacher's.

    lead-ds distill run.yaml 'plugins=[examples/own_loss.py]' losses.projected.weight=1

`plugins` lists the Python files or modules to import. A package needs no mention: its entry points of the group
`lead_ds.losses` are found. The map is trained, sharded, checkpointed and resumed, but not saved with the student.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lead_ds.losses import Loss, LossSettings, LossShape, Views, register


class ProjectedSettings(LossSettings):
    """Cosine distance between the mapped student's vectors and the teacher's."""

    passages: bool = True  # compare passages besides queries


@register
class Projected(Loss):
    """L = mean over texts of 1 - cos(W s, t), with W [teacher's width, student's width] learned."""

    name, Settings, needs = "projected", ProjectedSettings, frozenset({"features"})

    def __init__(self, settings: ProjectedSettings, shape: LossShape) -> None:
        super().__init__(settings, shape)
        self.map = torch.nn.Linear(shape.student.width, shape.teacher.width, bias=False)

    def forward(self, views: Views) -> Tensor:
        student, teacher = views.student.final, views.teacher.final
        pairs = [(student.q_KQD, teacher.q_KQD), (student.p_KPD, teacher.p_KPD)][: 1 + self.settings.passages]
        distances = [1 - cosine_similarity(self.map(s).float(), t.float(), dim=-1).mean() for s, t in pairs]
        return torch.stack(distances).mean()
