"""What each layer of a dual-encoder teacher knows of the training queries, at several temperatures.

Read from the vectors that `quality teach --teacher de` wrote: a layer's cosines of each query with all passages of a batch, as
the layer loss sees them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lead_ds.data.groups.group import Group
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught.vectors import VectorCache
from lead_ds.settings.data import DataConfig

TEMPERATURES = (0.2, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.005, 0.002, 0.001)


def layers_of(data: DataConfig, cache: Path, batch: int, seed: int = 888) -> list[dict[str, Any]]:
    """A row for each layer: accuracy, the NLL of the positive at each temperature, and how its cosines go with the final ones.

    Whole batches of `batch` groups in a random order; passages that answer a query beside its positive are left out for it.
    """
    groups, vectors = open_groups(data), VectorCache.open(cache)
    names = [*(str(layer) for layer in vectors.layers), "final"]
    order = np.random.default_rng(seed).permutation(len(groups))
    found: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(order) - batch + 1, batch):
        rows = order[start : start + batch]
        drawn = [groups.draw(int(row), seed, 0) for row in rows]
        said = vectors.said(rows, [group.keys for group in drawn])
        queries_KQD, passages_KPD = (functional.normalize(torch.from_numpy(said[x]), dim=-1) for x in said)
        cosines_KQP = queries_KQD @ passages_KPD.transpose(1, 2)
        for name, cosines_QP in zip(names, cosines_KQP, strict=True):
            found[name].append(cosines_QP.masked_fill(hidden(drawn), -torch.inf))
    final_NP = torch.cat(found["final"])
    return [row_of(name, torch.cat(found[name]), final_NP, batch, data.negatives + 1) for name in names]


def hidden(groups: list[Group]) -> Tensor:
    """bool [Q, P]: passages of the batch that answer the query, other than the positive of its own group."""
    keys, size = np.concatenate([group.keys for group in groups]), len(groups[0].keys)
    mask = np.stack([np.isin(keys, group.positive_keys) for group in groups])
    mask[np.arange(len(groups)), np.arange(len(groups)) * size] = False
    return torch.from_numpy(mask)


def row_of(name: str, cosines_NP: Tensor, final_NP: Tensor, batch: int, size: int) -> dict[str, Any]:
    """A layer's row. N queries, batch after batch, each with the P passages of its batch; `size` of them its own."""
    targets = (torch.arange(len(cosines_NP)) % batch) * size
    nll = {str(t): round(float(functional.cross_entropy(cosines_NP / t, targets)), 3) for t in TEMPERATURES}
    return {
        "layer": name,
        "accuracy": round(float((cosines_NP.argmax(-1) == targets).float().mean()), 3),
        "correlation": round(float(np.mean([correlation(x, y) for x, y in zip(cosines_NP, final_NP, strict=True)])), 3),
        "best_temperature": float(min(nll, key=lambda t: nll[t])),
        "nll": nll,
    }


def correlation(a_P: Tensor, b_P: Tensor) -> float:
    """Of two layers' cosines of one query, over the passages that both see."""
    seen = a_P.isfinite() & b_P.isfinite()
    return float(torch.corrcoef(torch.stack([a_P[seen], b_P[seen]]))[0, 1])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = ["layer", "first", "correlation with the final state", *(f"NLL at {t}" for t in TEMPERATURES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        values = [f"{row['accuracy']:.3f}", f"{row['correlation']:.2f}", *(f"{x:.2f}" for x in row["nll"].values())]
        lines.append("| " + " | ".join([row["layer"], *values]) + " |")
    return "\n".join(lines)
