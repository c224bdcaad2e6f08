"""The mean of a run's last checkpoints, of equal weights or of weights searched on the evaluation's split, to be exported.

Wortsman et al., Model soups, arXiv 2203.05482: averages of weights along, or beside, one run are often better than each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lead_ds.config import Config
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.checkpoint import Checkpoints, write_json
from lead_ds.engine.training.trainee import gathered_state_dict, persistent_buffers
from lead_ds.errors import RunError
from lead_ds.models.scorer import Scorer

RECORD = "average.json"
PASSES = 2  # over the checkpoints, in which each may be added once more
State = dict[str, Tensor]


@dataclass(frozen=True)
class Average:
    """Which checkpoints, how often each counts, and what that measured (None: not measured)."""

    checkpoints: list[str]
    counts: list[int]
    value: float | None = None


def average(config: Config, engine: Any, checkpoints: Checkpoints, evaluator: Any, ranks: Ranks) -> Average:
    """Give the engine's student the mean of its last checkpoints, and note of which in the run's folder. Every rank calls this.

    By `dev`: the best of them by the evaluation's metric, then each of the others, best first, where it makes the mean
    better. In two passes, so that one may count more often. Raises RunError where there are too few checkpoints.
    """
    wanted = config.train.average
    assert wanted is not None
    names = checkpoints.last(wanted)
    if len(names) < wanted:
        what = f"{wanted} checkpoints are to be averaged, there are {len(names)}"
        raise RunError(
            checkpoints.folder, what, "set train.save_every, or train.average, lower; continue with --resume"
        )
    student, saved = engine.module.student, list[State | None]()
    for name in names:
        checkpoints.load(engine, checkpoints.folder / name)
        saved.append(gathered_state_dict(student, ranks))

    def measured(counts: Sequence[int]) -> float:
        put(student, mean_of(saved, counts) if ranks.main else None, ranks)
        return float(evaluator(student)[config.evaluation.metric])

    found = Average(names, [1] * len(names))
    if config.train.average_by == "dev":
        found = search(names, measured)
    elif evaluator is not None:
        found = Average(names, found.counts, measured(found.counts))
    put(student, mean_of(saved, found.counts) if ranks.main else None, ranks)
    if ranks.main:
        write_json(Path(config.output) / RECORD, asdict(found))
    return found


def search(names: list[str], measured: Any) -> Average:
    """Counts that measure best, greedily: the best checkpoint, and then whatever makes the mean better.

    >>> found = search(["a", "b", "c"], lambda counts: -abs(counts[0] - counts[1]) - counts[2])
    >>> found.counts, found.value
    ([1, 1, 0], 0)
    """
    alone = [measured([int(i == j) for j in range(len(names))]) for i in range(len(names))]
    order = sorted(range(len(names)), key=lambda i: -alone[i])
    counts, value = [int(i == order[0]) for i in range(len(names))], alone[order[0]]
    for turn in range(PASSES):
        for place in order[1:] if turn == 0 else order:
            tried = [count + (i == place) for i, count in enumerate(counts)]
            found = measured(tried)
            if found > value:
                counts, value = tried, found
    return Average(names, counts, value)


def mean_of(saved: Sequence[State | None], counts: Sequence[int]) -> State:
    """The mean of weights that count so often, summed in float32, in their dtypes; what is not a float is the last's."""
    known = [(state, count) for state, count in zip(saved, counts, strict=True) if state is not None and count]
    whole, last = sum(count for _, count in known), known[-1][0]
    found: State = {}
    for name, x in last.items():
        if x.is_floating_point():
            total = torch.stack([state[name].float() * (count / whole) for state, count in known]).sum(0)
            found[name] = total.to(x.dtype)
        else:
            found[name] = x
    return found


@torch.no_grad()
def put(student: Scorer, state: State | None, ranks: Ranks) -> None:
    """Give a student the weights that rank 0 holds; one that ZeRO-3 shards, one at a time. Every rank calls this."""
    import deepspeed

    for name, tensor in (*student.named_parameters(), *persistent_buffers(student)):
        sharded = hasattr(tensor, "ds_id")
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=sharded):
            if state is not None:
                tensor.copy_(state[name])
            if ranks.world > 1 and not sharded:
                dist.broadcast(tensor, src=0)
