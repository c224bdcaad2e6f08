"""Curriculum over steps: negatives from those with the lowest scores to those with the highest."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lead_ds.data.groups.drawing import Draw
from lead_ds.data.groups.group import Groups
from lead_ds.errors import InputError
from lead_ds.settings.data import DataConfig


def scheduled(config: DataConfig, groups: Groups) -> Groups:
    """The groups that a schedule draws from: of passages with a score alone. Without a schedule, themselves.

    Raises InputError where there are no scores or too few, and where no group leaves a choice.
    """
    if config.schedule is None:
        return groups
    if not groups.has_scores:
        what = f"orders negatives by their scores, and {groups.path} has none"
        raise InputError("data.schedule", what, "score them first (lead-ds mine --rescore MODEL), or take it out")
    scored = groups.scored()
    if not any(scored.offered(row) > config.negatives for row in range(len(scored))):
        what = f"orders nothing: no group of {groups.path} has more than {config.negatives} negatives with a score"
        raise InputError("data.schedule", what, "lower data.negatives, or take it out")
    return scored


def easy_to_hard(draw: Draw, scores_N: np.ndarray, wanted: int, progress: float) -> Iterator[int]:
    """Places of negatives: of a half of them in random order, then the others, the nearest in score first.

    The half moves from the lowest scores (progress 0) to the highest (1); it has `wanted` negatives at least.

    >>> [sorted(list(easy_to_hard(Draw(0), np.array([3.0, 1.0, 2.0, 4.0]), 1, at))[:2]) for at in (0, 0.5, 1)]
    [[1, 2], [0, 2], [0, 3]]
    """
    ranked = np.argsort(scores_N, kind="stable").tolist()
    width = min(len(ranked), max(wanted, -(-len(ranked) // 2)))
    first = round(progress * (len(ranked) - width))
    yield from (ranked[first + i] for i in draw.shuffled(width))
    middle = first + (width - 1) / 2
    others = [place for place in range(len(ranked)) if not first <= place < first + width]
    yield from (ranked[place] for place in sorted(others, key=lambda place: abs(place - middle)))
