"""What float16 leaves of relevance that is computed from cached vectors: stored as they are, and as deviations from their mean.

    python -m benchmarks.vector_precision run.yaml data.path=DATA

Reads drawn groups with the configuration's dual encoder in float32. Of each layer and of the final state: by how much a
query's relevance of a passage is off, over how far a query's relevances lie apart. Both are root mean squares, less the
query's mean, which a softmax does not see: one of the error, one of relevance itself. 1 means that nothing is left of
what the layer gives.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor

from lead_ds.config import load_config
from lead_ds.data.groups.open import open_groups
from lead_ds.models.load import load_teacher, load_text
from lead_ds.report.summary import Table, aligned

AT_ONCE = 10  # groups of a forward


def vectors(path: str, overrides: list[str], groups: int) -> tuple[Tensor, Tensor]:
    """Queries [T + 1, Q, D] and passages [T + 1, P, D] of some groups, float32."""
    config = load_config(path, overrides)
    if config.teacher is None or config.teacher.kind != "dual_encoder":
        raise SystemExit("error: teacher.kind is to be dual_encoder")
    data, text = open_groups(config.data), load_text(config.teacher)
    model = load_teacher(config.teacher, torch.float32).eval()
    layers = list(range(model.num_layers))
    rows = random.Random(config.seed).sample(range(len(data)), min(groups, len(data)))
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for first in range(0, len(rows), AT_ONCE):
            drawn = [data.draw(row, config.seed, 0) for row in rows[first : first + AT_ONCE]]
            queries = text.queries([group.query for group in drawn])
            passages = text.passages([passage for group in drawn for passage in group.passages])
            found.append((model(tokens=queries, layers=layers), model(tokens=passages, layers=layers)))
    q_KQD, p_KPD = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return q_KQD, p_KPD


def halved(x_KBD: Tensor, centred: bool) -> Tensor:
    """Vectors as they come back from float16."""
    mean_K1D = x_KBD.mean(1, keepdim=True) if centred else torch.zeros(())
    return (x_KBD - mean_K1D).half().float() + mean_K1D


def spread(q_KQD: Tensor, p_KPD: Tensor, cosine: bool) -> Tensor:
    """Relevance less its mean over a query's passages, float64 [K, Q, P]."""
    q, p = (torch.nn.functional.normalize(x.double(), dim=-1) if cosine else x.double() for x in (q_KQD, p_KPD))
    relevance = torch.bmm(q, p.transpose(1, 2))
    return relevance - relevance.mean(-1, keepdim=True)


def main() -> None:
    """A table: a line a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--groups", type=int, default=40)
    options = parser.parse_args()
    q_KQD, p_KPD = vectors(options.config, options.overrides, options.groups)
    rows: Table = [["layer", "dot: as it is", "deviations", "cosine: as it is", "deviations"]]
    columns = []
    for cosine in (False, True):
        true = spread(q_KQD, p_KPD, cosine)
        for centred in (False, True):
            off = spread(halved(q_KQD, centred), halved(p_KPD, centred), cosine) - true
            columns.append(off.square().mean((1, 2)).sqrt() / true.square().mean((1, 2)).sqrt())
    for layer, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        name = str(layer) if layer < len(columns[0]) - 1 else "final"
        rows.append([name, *(f"{value:.1e}" for value in values)])
    print(aligned(rows))


if __name__ == "__main__":
    main()
