"""Matryoshka: a loss of the student's whole vectors, and of their first dimensions alone, so that these serve as vectors.

Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lead_ds.errors import InputError
from lead_ds.losses.views import Views
from lead_ds.relevance import Features

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


def at_widths(
    loss: Callable[[Views], Said], name: str, views: Views, dims: Sequence[int], *, unit: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of a loss over widths of the student's vectors, each counting alike; statistics are those of the last.

    dims: ascending, whole vectors last. unit: the student's vectors have length 1, and so have their first dimensions.
    The loss of each narrower width is among the statistics, under `name@width`.

    >>> from lead_ds.losses import Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.ones(1, 1, 4), torch.ones(1, 1, 4)))
    >>> def width(views): return torch.tensor(float(views.student.final.width)), {}
    >>> value, statistics = at_widths(width, "x", Views(student, None, Scope(group=1)), [2, 4], unit=False)
    >>> value.item(), statistics["x@2"].item()
    (3.0, 2.0)
    """
    values, more = list[Tensor](), dict[str, Tensor]()
    for dim in dims[:-1]:
        value, _ = loss(views.mapped(partial(_narrowed, dim=dim, unit=unit)))
        values.append(value)
        more[f"{name}@{dim}"] = value.detach()
    value, statistics = loss(views)
    return torch.stack([*values, value]).mean(), {**statistics, **more}


def _narrowed(features: Features, dim: int, unit: bool) -> Features:
    return features.truncated(dim, unit=unit)
