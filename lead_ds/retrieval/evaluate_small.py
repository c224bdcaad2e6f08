"""What small vectors cost: quality by exact search over a corpus whose vectors are held in few bits, and their bytes.

Q queries, P passages of this process, n candidates, k results, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.collections.qrels import Run
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.models.kinds.kind import Kind
from lead_ds.retrieval.encode import Encoding
from lead_ds.retrieval.encoded import Encoded, encode_both, make_run
from lead_ds.retrieval.evaluate import Task, dual_encoder, evaluating, measured
from lead_ds.retrieval.exact import exact_search
from lead_ds.retrieval.metrics import Scores
from lead_ds.retrieval.peers import ALONE, Peers
from lead_ds.retrieval.small import RESCORED, bytes_of, quantise, ranges_of, rescore, restored


@dataclass(frozen=True)
class Row:
    """Quality of a corpus held as `precision`: bytes of a passage that search reads; what candidates are scored again by."""

    precision: str
    rescored_by: str
    bytes: int
    scores: Scores


def evaluate_small(
    scorer: Kind,
    encoder: TextEncoder,
    task: Task,
    precisions: Sequence[str],
    *,
    batch_size: int = 64,
    peers: Peers = ALONE,
    quiet: bool = False,
) -> list[Row]:
    """As `evaluate_model`, of passages held as each of `precisions`: float32, int8, binary, ubinary. Queries stay floats.

    Signs are searched by signs, and RESCORED * k candidates scored again: by the passages' signs, and once more by int8.
    Every text is encoded once. Every process calls this.
    """
    scorer, qrels = dual_encoder(scorer), task.qrels()
    scorer.refuse_sparse(scorer.config.path, "small vectors are made of dense ones")
    how = Encoding(batch_size, next(scorer.parameters()).device)
    with evaluating(scorer):
        encoded = encode_both(scorer.ranked, encoder, task.dataset, list(qrels), how, peers=peers, quiet=quiet)
    rows, width = list[Row](), encoded.queries.shape[1]
    for precision in precisions:
        if precision == "float32":
            held = {"": encoded}
        elif precision == "int8":
            held = {"": _int8(encoded)}
        else:
            signs = torch.where(encoded.passages > 0, 1.0, -1.0) / max(1, width) ** 0.5
            held = {"": Signs.of(encoded, None), "signs": Signs.of(encoded, signs)}
            held["int8"] = Signs.of(encoded, _int8(encoded).passages)
        for by, vectors in held.items():
            scores = measured(vectors, task, qrels, quiet=quiet)
            rows.append(Row(precision, by, bytes_of(precision, width), scores))
    return rows


def _int8(encoded: Encoded) -> Encoded:
    """Passages as int8 holds them, calibrated on all of them."""
    own = encoded.passages.cpu().numpy()
    parts = [part for part in encoded.peers.all(ranges_of(own) if len(own) else None) if part is not None]
    ranges = ranges_of(np.concatenate(parts))
    if not len(own):
        return encoded
    held = restored(quantise(own, "int8", ranges), "int8", own.shape[1], ranges)
    return replace(encoded, passages=torch.from_numpy(held).to(encoded.passages))


@dataclass(frozen=True)
class Signs(Encoded):
    """Passages searched by signs; by: this process's vectors [P, D] that candidates are scored again by (None: not at all)."""

    by: Tensor | None = None

    @classmethod
    def of(cls, encoded: Encoded, by: Tensor | None) -> Signs:
        """Of floats."""
        return cls(**{**vars(encoded), "by": by})

    def search(self, k: int) -> Run:
        """See `Encoded`. The candidates are the best by signs of all processes."""
        n = min(k if self.by is None else RESCORED * k, len(self.passage_ids))
        apart, again, rows = (torch.empty(len(self.query_ids), 0) for _ in range(3))
        if len(self.passages):
            signs_QD, signs_PD = (torch.where(x > 0, 1.0, -1.0) for x in (self.queries, self.passages))
            apart, rows = exact_search(signs_QD, signs_PD, n)
            again = apart
            if self.by is not None:
                by = self.by
                scores, order = rescore(self.queries, rows, lambda some: by[some], rows.shape[1])
                again = torch.empty_like(scores).scatter_(1, _places(rows, order), scores)
        found = self.peers.all([x.cpu().numpy() for x in (apart, again, rows + self.start)])
        if self.peers.rank != 0:
            return {}
        apart, again, rows = (torch.cat([torch.from_numpy(part[i]) for part in found], 1) for i in range(3))
        kept = apart.argsort(dim=1, descending=True, stable=True)[:, :n]
        again, rows = again.gather(1, kept), rows.gather(1, kept).long()
        best, places = again.topk(min(k, n), dim=1)
        return make_run(self.query_ids, best.tolist(), rows.gather(1, places).tolist(), self.passage_ids)


def _places(rows_Qn: Tensor, order_Qn: Tensor) -> Tensor:
    """Where in `rows` each of `order`, the same rows in another order, stands."""
    return rows_Qn.argsort(dim=1).gather(1, order_Qn.argsort(dim=1).argsort(dim=1))
