"""A loss of your own, with weights: the student's vectors, mapped into the teacher's space, against the teacher's.

    lead-ds distill run.yaml 'plugins=[examples/own_loss.py]' losses.projected.weight=1

`plugins` lists the Python files or modules to import. A package needs no mention: its entry points of the group
`lead_ds.losses` are found. The map is trained, sharded, checkpointed and resumed, but not saved with the student.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lead_ds.losses import Loss, LossSettings, LossShape, Views, final_vectors, register


class ProjectedSettings(LossSettings):
    """Cosine distance between the mapped student's vectors and the teacher's."""

    passages: bool = True  # compare passages besides queries


@register
class Projected(Loss):
    """L = mean over texts of 1 - cos(W s, t), with W [teacher's width, student's width] learned."""

    name, Settings, needs = "projected", ProjectedSettings, frozenset({"features"})

    def __init__(self, settings: ProjectedSettings, shape: LossShape) -> None:
        super().__init__(settings, shape)
        self.map = torch.nn.Linear(*shape.widths(self.name), bias=False)

    def forward(self, views: Views) -> Tensor:
        student = final_vectors(views.student, "student", self.name)  # of queries, of passages
        teacher = final_vectors(views.teacher, "teacher", self.name)
        pairs = list(zip(student, teacher, strict=True))[: 1 + self.settings.passages]
        mapped = [(self.map(s.to(self.map.weight.dtype)).float(), t) for s, t in pairs]
        distances = [1 - cosine_similarity(s, t, dim=-1).mean() for s, t in mapped]
        return torch.stack(distances).mean()
