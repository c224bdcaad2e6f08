"""The objective of a micro-batch: the losses of a run, weighted and summed, and what each of them saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.losses.loss import Loss, Losses, LossShape
from lead_ds.losses.matryoshka import at_widths, check_widths
from lead_ds.losses.selection import NO_LAYERS, Layers
from lead_ds.losses.views import Views


@dataclass(frozen=True)
class Asked:
    """The layers that a step compares: of each loss, and what the models must therefore capture (layers) and tap."""

    pairs: Mapping[str, Layers] = field(default_factory=dict)
    layers: Layers = NO_LAYERS
    taps: Layers = NO_LAYERS


@dataclass(frozen=True)
class ObjectiveOutput:
    """loss: scalar with gradient. Everything else is detached.

    parts: scalars by name, each loss before its weight among them. layers: vectors [K] of layer pairs, by the row of
    metrics.jsonl that they stand in and by name.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    layers: dict[str, dict[str, Tensor]]


class Objective(nn.ModuleDict):
    """sum of weight * loss over the losses whose weight is not 0. The modules live here, by name.

    Where the student's vectors are trained at several widths, each loss that reads them is its mean over these.
    Raises InputError when every weight is 0, and for widths that the student's vectors do not have.
    """

    def __init__(self, losses: Losses, shape: LossShape) -> None:
        super().__init__(losses.build(shape))
        self.shape = shape
        if shape.dims:
            check_widths(shape.dims, shape.student.width)
        if not len(self):
            raise InputError("losses", "every weight is 0, there is nothing to learn", "give one loss a weight")

    def asked(self, pairs: Mapping[str, Layers]) -> Asked:
        """What the models must give for losses that compare the layers `pairs`."""
        return Asked(
            pairs,
            _together(pairs, lambda name: "layers" in self._loss(name).needs),
            _together(pairs, lambda name: "attention" in self._loss(name).needs),
        )

    def rows(self, asked: Asked) -> dict[str, Layers]:
        """The layers compared, by the row of metrics.jsonl in which statistics of them stand."""
        return {self._loss(name).row or name: layers for name, layers in asked.pairs.items()}

    def forward(self, views: Views, asked: Asked) -> ObjectiveOutput:
        """Loss, parts and layer statistics of one micro-batch, whose `views` hold the requested layers."""
        weighted, parts, layers = list[Tensor](), dict[str, Tensor](), dict[str, dict[str, Tensor]]()
        for name in self:
            loss = self._loss(name)
            value, statistics = self._said(name, views.of_layers(asked.pairs.get(name, NO_LAYERS), asked.layers))
            weighted.append(loss.settings.weight * value)
            parts |= {name: value.detach()} | {key: x.detach() for key, x in statistics.items() if x.dim() == 0}
            vectors = {key: x.detach() for key, x in statistics.items() if x.dim() > 0}
            if vectors:
                layers[loss.row or name] = vectors
        return ObjectiveOutput(torch.stack(weighted).sum(), parts, layers)

    def losses(self) -> Iterator[tuple[str, Loss]]:
        """Every loss by its name."""
        return ((name, self._loss(name)) for name in self)

    def _said(self, name: str, views: Views) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A loss, and its statistics; the mean over widths where it reads vectors."""
        loss = self._loss(name)

        def said(views: Views) -> tuple[Tensor, Mapping[str, Tensor]]:
            found = loss(views)
            return found if isinstance(found, tuple) else (found, {})

        if len(self.shape.dims) > 1 and loss.needs != {"attention"}:  # which reads tokens' maps, not vectors
            return at_widths(said, name, views, self.shape.dims, unit=self.shape.student.unit)
        return said(views)

    def _loss(self, name: str) -> Loss:
        loss = self[name]
        assert isinstance(loss, Loss)
        return loss


def _together(pairs: Mapping[str, Layers], which: Callable[[str], bool]) -> Layers:
    """All layers of the losses that are meant, each once, in order of first appearance."""
    chosen = [layers for name, layers in pairs.items() if which(name)]
    teacher, student = (list(dict.fromkeys(layer for pair in chosen for layer in pair[side])) for side in (0, 1))
    return teacher, student
