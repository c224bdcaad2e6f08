"""The longest passage of all ranks, where every token of it is compared: hosts agree on it, so that no GPU is waited for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.distributed as dist

from lead_ds.data.batches import Window
from lead_ds.data.reads import ModelBatch
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.models.kinds.colbert import ColBERT

Longest = tuple[int | None, ...]  # of the student, then of each teacher; None: not agreed on


class Lengths:
    """Tokens that each rank pads passages to before they are gathered, by the ranks' common store.

    models: the student's scorer, then those of the teachers.
    """

    _made: ClassVar[int] = 0

    def __init__(self, ranks: Ranks, models: Sequence[Any], gathers: bool) -> None:
        self.ranks = ranks
        self.compared = [gathers and isinstance(model, ColBERT) for model in models]
        if any(self.compared):
            Lengths._made += 1  # one process may train twice: on every rank the same number
            store = dist.distributed_c10d._get_default_store()
            self.store: Any = dist.PrefixStore(f"lead-ds/lengths-{Lengths._made}", store)

    def agree(self, step: int, window: Window) -> list[Longest]:
        """For each micro-batch of a step's window. Every rank must call this for every step."""
        count = len(window.student)
        if not any(self.compared):
            return [()] * count
        own = [[_longest([batch]) for batch in window.student] if self.compared[0] else []]
        own += [
            [_longest(batches)] if compared else []
            for compared, batches in zip(self.compared[1:], window.teachers, strict=False)
        ]
        self.store.set(f"{step}/{self.ranks.rank}", json.dumps(own))
        everyone = [json.loads(self.store.get(f"{step}/{rank}")) for rank in range(self.ranks.world)]
        self.store.delete_key(f"{step - 1}/{self.ranks.rank}")  # which all have read: they have written this step's
        student, *teachers = ([max(each) for each in zip(*lists, strict=True)] for lists in zip(*everyone, strict=True))
        last = tuple(longest[0] if longest else None for longest in teachers)
        return [((student[index] if student else None), *last) for index in range(count)]


def _longest(batches: Sequence[ModelBatch]) -> int:
    """Tokens that these batches' passages are padded to."""
    return max(0 if batch.passages is None else batch.passages["input_ids"].shape[1] for batch in batches)
