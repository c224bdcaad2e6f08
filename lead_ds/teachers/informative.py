"""What a teacher's layers know: each layer's NLL of the positive within its group, and which layers are therefore worth learning.

Dimensions: T layers of the teacher, Q queries, N passages of each.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.batches import Batches
from lead_ds.data.groups.group import Groups
from lead_ds.data.reads import Reads
from lead_ds.data.taught.relevance import TeacherCache
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.io.notes import say_once
from lead_ds.losses.selection import informative_layers
from lead_ds.teachers.cached import CachedTeacher
from lead_ds.teachers.finite import constant
from lead_ds.teachers.teacher import Lesson, Teacher

MEASURED = 256  # groups, at the start of a run
MEASURED_OF_CACHE, AT_ONCE = 1000, 50


def informative(losses: Any, teacher: Teacher, place: int, batches: Batches, ranks: Ranks) -> list[int]:
    """The teacher's layers that `select: informative` draws from; [] where it is not selected. Every rank calls this.

    losses: those that it feeds. place: the teacher's, among those that `batches` serve.

    A lens was measured on groups that it was not fitted on. A model's own read-out was fitted on none of them: it is
    measured on the run's first groups, at the layer loss's temperature.
    """
    loss = losses.informative
    if loss is None:
        return []
    layers = teacher.readable
    if teacher.lens_facts is not None:
        nll, chance = [teacher.lens_facts["nll"][layer] for layer in layers], teacher.lens_facts["chance"]
    else:
        nll, chance = measure(teacher, place, batches, loss.teacher_temperature, ranks), math.log(batches.group_size)
    return [layers[place] for place in informative_layers(nll, chance, loss.informative_margin)]


def measure(teacher: Teacher, place: int, batches: Batches, temperature: float, ranks: Ranks) -> list[float]:
    """NLL of the positive within its group, by each readable layer, over the run's first groups; equal on all ranks."""
    layers = teacher.readable
    step = ranks.world * batches.batch_size * batches.accumulation
    sums, count = torch.zeros(len(layers)), 0
    for window in map(batches.window, range(min(-(-MEASURED // step), batches.steps_per_epoch))):
        view = teacher.window(window.teachers[place], layers)
        assert view.layers is not None
        nll_TQ = worth(view.layers.group_relevance(batches.group_size).logits / temperature)[0]
        sums, count = sums + nll_TQ.sum(1).cpu(), count + nll_TQ.shape[1]
    return ranks.mean((sums / count).to(ranks.device)).tolist()


def worth(logits_TQN: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of the positive, which is column 0, and whether it is ranked first (1/m: among m equal ones): [T, Q] each, float32."""
    best_TQN = (logits_TQN == logits_TQN.amax(-1, keepdim=True)).float()
    return -logits_TQN.log_softmax(-1)[..., 0], best_TQN[..., 0] / best_TQN.sum(-1)


def worth_of_cache(cache: TeacherCache, groups: Groups, lesson: Lesson) -> dict[str, Any]:
    """NLL and accuracy of each cached layer and of the final state, over draws of some training groups."""
    rows = Random(lesson.seed).sample(range(len(groups)), min(MEASURED_OF_CACHE, len(groups)))
    teacher, group_size = CachedTeacher(cache, lesson.teacher, torch.device("cpu")), 1 + lesson.data.negatives
    found, same = [], group_size > 1
    for first in range(0, len(rows), AT_ONCE):
        some = np.array(rows[first : first + AT_ONCE])
        drawn = [groups.draw(int(row), lesson.seed, epoch=0) for row in some]
        view = teacher.window(Reads(lookup=cache).batches(some, drawn), teacher.readable)
        parts = [part.group_relevance(group_size).logits for part in (view.layers, view.final) if part is not None]
        same = same and bool((parts[-1] == parts[-1][..., :1]).all())
        found.append(worth(torch.cat(parts) / lesson.losses.layer.teacher_temperature))
    if same:
        say_once(constant(f"{cache.folder}: holds of", "that were looked at"))
    nll_T, first_T = (torch.cat(parts, 1).mean(1).tolist() for parts in zip(*found, strict=True))
    return {
        "groups": len(rows),
        "passages": group_size,
        "chance": math.log(group_size),
        "layers": teacher.readable,
        "nll": nll_T,
        "accuracy": first_T,
    }
