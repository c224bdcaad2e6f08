"""Texts sorted by length into a few passes, each padded to its own longest only; or packed, several in a row, into one.

Dimensions: B texts, n passes, L tokens; packed: R rows of M tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Tokens = dict[str, Tensor]  # as in lead_ds.data.tokens.encoder
Cuts = Callable[[np.ndarray, int], list[int]]
FILL = (
    3  # longest texts that a packed row holds: more leave less padding, and cost attention (benchmarks/throughput.md)
)
MOST = 4  # passes of `Fewest`: more save little (benchmarks/README.md)
ENOUGH = 0.95  # of the tokens: 4 passes that save none take 1.03 of the time
_ROWS = ("input_ids", "token_type_ids")


@dataclass(frozen=True)
class Fewest:
    """How many passes a batch is read in: as many as save padding, by the lengths of its texts. None: no passes.

    sharded: as many forwards as without, for every rank must run a sharded model as often as the others. least: tokens that
    keep a device busy; a pass holds no fewer on average.
    """

    sharded: bool
    least: int

    def of(self, tables: Sequence[Tokens]) -> int | None:
        """For a batch of these texts: of queries, then of passages, say. A module of one's own may read something else."""
        if not all({"input_ids", "attention_mask"} <= table.keys() for table in tables):
            return None
        plain = sum(table["input_ids"].numel() for table in tables)
        n = len(tables) if self.sharded else min(MOST, plain // self.least)
        if n < 2:
            return None
        lengths_B = np.sort(np.concatenate([_lengths(table) for table in tables]))[::-1]
        bounds = least_padding(lengths_B, n)
        tokens = sum(int(lengths_B[first]) * (last - first) for first, last in pairwise(bounds))
        return n if tokens <= ENOUGH * plain else None


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
    joined = _joined(tables, pad)
    lengths = _lengths(joined)
    rows_B = np.argsort(-lengths, kind="stable")
    bounds = cuts(lengths[rows_B], n)
    order = np.empty(len(rows_B), np.int64)
    order[rows_B] = np.arange(len(rows_B))
    passes = []
    for first, last in pairwise(bounds):
        picked, longest = torch.from_numpy(rows_B[first:last]), int(lengths[rows_B[first]])
        passes.append({name: x[picked, :longest] for name, x in joined.items()})
    return Passes(passes, torch.from_numpy(order))


def packed(tables: Sequence[Tokens], pad: int) -> Passes:
    """The rows of `tables`, one after the other, in one pass without padding to speak of.

    Its tokens are those of R rows [R, M], each of which holds several texts: `input_ids` (and `token_type_ids`),
    `position_ids`, which start at 0 with every text, and `bounds`. Those are int32: where texts begin in the rows laid
    end to end, and their end. What is left of a row is a text of its own that nobody reads. `places` [B, L] leads back
    to the texts: token j of text i is token `places[i, j]` of the rows laid end to end, if `attention_mask` [B, L] has
    it.
    """
    joined = _joined(tables, pad)
    mask = joined["attention_mask"].bool()
    mask[:, 0] |= ~mask.any(1)  # a text of no token is one of padding, as it is unpacked
    lengths_B = mask.sum(1)
    rows = _filled(lengths_B.numpy())
    width = max(int(lengths_B[texts].sum()) for texts in rows)
    start_B = torch.empty_like(lengths_B)
    ends = []
    for row, texts in enumerate(rows):
        stops = lengths_B[texts].cumsum(0)
        start_B[texts] = row * width + stops - lengths_B[texts]
        ends.append(row * width + int(stops[-1]))
    token_L = torch.arange(int(lengths_B.max()))
    real_BL = token_L < lengths_B[:, None]
    places_BL = start_B[:, None] + torch.minimum(token_L, lengths_B[:, None] - 1)

    def laid_out(values_BL: Tensor, fill: int) -> Tensor:
        rows_RM = values_BL.new_full((len(rows), width), fill)
        rows_RM.view(-1)[places_BL[real_BL]] = values_BL[mask]
        return rows_RM

    starts = torch.cat([start_B, torch.tensor([end for end in ends if end % width], dtype=torch.int64)]).sort().values
    bounds = torch.cat([starts, torch.tensor([len(rows) * width])])
    sizes = bounds.diff()
    tokens = {name: laid_out(joined[name], pad if name == "input_ids" else 0) for name in _ROWS if name in joined}
    tokens["position_ids"] = (torch.arange(len(rows) * width) - starts.repeat_interleave(sizes)).view(len(rows), width)
    tokens |= {"bounds": bounds.int(), "places": places_BL, "attention_mask": real_BL.long()}
    return Passes([tokens], torch.arange(len(lengths_B)))


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


def _filled(lengths_B: np.ndarray) -> list[Tensor]:
    """The texts of each row: as many rows as hold FILL of the longest, the next longest text into the emptiest of them.

    Rows are then about equally long: their lengths differ by no more than a text's, by far less where texts are many.
    """
    count = max(1, round(int(lengths_B.sum()) / (FILL * int(lengths_B.max()))))
    heap = [(0, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in heap]
    for text in np.argsort(-lengths_B, kind="stable"):
        taken, row = heapq.heappop(heap)
        rows[row].append(int(text))
        heapq.heappush(heap, (taken + int(lengths_B[text]), row))
    return [torch.tensor(texts) for texts in rows]


def _lengths(tokens: Tokens) -> np.ndarray:
    """Tokens of each text, up to its last."""
    # A ColBERT query's expansion is not attended to, and counts all the same.
    counts_BL = tokens["attention_mask"].bool() | tokens.get("score_mask", tokens["attention_mask"]).bool()
    return (counts_BL * torch.arange(1, counts_BL.shape[1] + 1)).amax(1).clamp_min(1).numpy()


def _joined(tables: Sequence[Tokens], pad: int) -> Tokens:
    width = max(table["input_ids"].shape[1] for table in tables)
    joined: Tokens = {}
    for name in tables[0]:
        fill = pad if name == "input_ids" else 0
        rows = [torch.nn.functional.pad(table[name], (0, width - table[name].shape[1]), value=fill) for table in tables]
        joined[name] = torch.cat(rows)
    return joined


def _exactly(bounds: list[int], n: int) -> list[int]:
    """Halve the widest passes until there are n, or one per text."""
    while len(bounds) <= min(n, bounds[-1]):
        sizes = np.diff(bounds)
        widest = int(sizes.argmax())
        bounds.insert(widest + 1, bounds[widest] + int(sizes[widest]) // 2)
    return bounds
