"""Matryoshka: a loss of the student's whole vectors, and of their first dimensions alone, so that these serve as vectors.

Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lead_ds.errors import InputError
from lead_ds.losses.views import Views
from lead_ds.relevance import Features

Change = Callable[[Features], Features]
Said = tuple[Tensor, Mapping[str, Tensor]]
"""A loss, and its statistics by name."""


def check_widths(dims: Sequence[int], width: int | None) -> None:
    """Raise InputError for widths that vectors of `width` do not have, and where some of their dimensions are in none."""
    where = "student.dims"
    if width is None:
        raise InputError(where, "the student gives scores, which have no width", "take it out")
    if dims[-1] > width:
        raise InputError(where, f"{dims[-1]} requested, its vectors have {width} dimensions", f"use at most {width}")
    if dims[-1] < width:
        what = f"its vectors have {width} dimensions, and those beyond {dims[-1]} would not be trained"
        raise InputError(where, what, f"add {width}, or set student.projection: {dims[-1]}")


def mean_over(
    loss: Callable[[Views], Said], name: str, views: Views, changes: Mapping[str, Change]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of a loss over the student's vectors as they are and after each of `changes`, each counting alike.

    Statistics are those of the vectors as they are, but for one of the loss's name: a mean, too. Each changed one's loss is
    among them, under the loss's name and its own.

    >>> from lead_ds.losses import Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.ones(1, 1, 4), torch.ones(1, 1, 4)))
    >>> def width(views): return torch.tensor(float(views.student.final.width)), {}
    >>> value, statistics = mean_over(width, "x", Views(student, None, Scope(group_size=1)), {"@2": first(2, unit=False)})
    >>> value.item(), statistics["x@2"].item()
    (3.0, 2.0)
    """
    value, statistics = loss(views)
    values, shown = [value], dict(statistics)
    for label, change in changes.items():
        value, more = loss(views.mapped(change))
        values.append(value)
        shown[f"{name}{label}"] = more.get(name, value).detach()  # with a teacher trained along, the student's own part
    if name in statistics:
        shown[name] = torch.stack([shown[name + label] for label in ("", *changes)]).mean()
    return torch.stack(values).mean(), shown


def first(dim: int, *, unit: bool) -> Change:
    """The first `dim` dimensions of vectors, at length 1 where `unit`."""
    return lambda features: features.truncated(dim, unit=unit)
