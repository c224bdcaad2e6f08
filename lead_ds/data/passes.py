"""Texts sorted by length into a few passes, each padded to its own longest only, and the way back to their order.

Dimensions: B texts, n passes, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Tokens = dict[str, Tensor]  # as in lead_ds.data.tokens
Cuts = Callable[[np.ndarray, int], list[int]]


@dataclass
class Passes:
    """n passes of B texts, longest first; text i of the batch is row `order[i]` of the passes joined."""

    tokens: list[Tokens]
    order: Tensor  # int64 [B]

    def map(self, change: Callable[[Tensor], Tensor]) -> Passes:
        """The same with every tensor changed."""
        return Passes([{name: change(x) for name, x in one.items()} for one in self.tokens], change(self.order))


def in_passes(tables: Sequence[Tokens], n: int, cuts: Cuts, pad: int) -> Passes:
    """The rows of `tables` (of queries, then of passages, say), one after the other, in exactly min(n, B) passes.

    cuts: `least_padding` or `even`. pad: the id of padding. Every rank must have as many texts as the others, for a
    sharded model runs once per pass.
    """
    width = max(table["input_ids"].shape[1] for table in tables)
    joined: Tokens = {}
    for name in tables[0]:
        fill = pad if name == "input_ids" else 0
        rows = [torch.nn.functional.pad(table[name], (0, width - table[name].shape[1]), value=fill) for table in tables]
        joined[name] = torch.cat(rows)
    # A ColBERT query's expansion is not attended to, and counts all the same.
    counts = joined["attention_mask"].bool() | joined.get("score_mask", joined["attention_mask"]).bool()
    lengths = (counts * torch.arange(1, width + 1)).amax(1).clamp_min(1).numpy()
    rows_B = np.argsort(-lengths, kind="stable")
    bounds = cuts(lengths[rows_B], n)
    order = np.empty(len(rows_B), np.int64)
    order[rows_B] = np.arange(len(rows_B))
    passes = []
    for first, last in pairwise(bounds):
        picked, longest = torch.from_numpy(rows_B[first:last]), int(lengths[rows_B[first]])
        passes.append({name: x[picked, :longest] for name, x in joined.items()})
    return Passes(passes, torch.from_numpy(order))


def least_padding(lengths_B: np.ndarray, n: int) -> list[int]:
    """The n + 1 bounds of n passes of `lengths` (sorted, longest first) with the fewest tokens, padding included."""
    starts = np.flatnonzero(np.concatenate([[True], lengths_B[1:] != lengths_B[:-1]]))
    ends = np.concatenate([starts, [len(lengths_B)]])
    longest = lengths_B[starts]
    # cost[j]: of the texts before distinct length j, in as many passes as rounds have passed.
    cost = np.full(len(ends), np.inf)
    cost[0] = 0.0
    chosen: list[np.ndarray] = []
    for _ in range(min(n, len(starts))):
        # [i, j]: a pass from distinct length i up to, without, j.
        made = cost[:-1, None] + longest[:, None] * (ends[None, :] - starts[:, None])
        made[ends[None, :] <= starts[:, None]] = np.inf
        chosen.append(made.argmin(0))
        cost = made.min(0)
    bounds, at = [len(lengths_B)], len(ends) - 1
    for back in reversed(chosen):
        at = int(back[at])
        bounds.append(int(starts[at]))
    return _exactly(bounds[::-1], n)


def even(lengths_B: np.ndarray, n: int) -> list[int]:
    """The n + 1 bounds of n passes of `lengths` (sorted, longest first) of which the largest has the fewest tokens."""

    def bounds_within(budget: int) -> list[int]:
        bounds = [0]
        while bounds[-1] < len(lengths_B):
            bounds.append(min(len(lengths_B), bounds[-1] + budget // int(lengths_B[bounds[-1]])))
        return bounds

    low, high = int(lengths_B[0]), int(lengths_B[0]) * len(lengths_B)
    while low < high:
        middle = (low + high) // 2
        if len(bounds_within(middle)) <= n + 1:
            high = middle
        else:
            low = middle + 1
    return _exactly(bounds_within(low), n)


def _exactly(bounds: list[int], n: int) -> list[int]:
    """Halve the widest passes until there are n, or one per text."""
    while len(bounds) <= min(n, bounds[-1]):
        sizes = np.diff(bounds)
        widest = int(sizes.argmax())
        bounds.insert(widest + 1, bounds[widest] + int(sizes[widest]) // 2)
    return bounds
