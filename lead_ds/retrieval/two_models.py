"""Evaluation of two models in one space: a student asks what its teacher encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds.models.router import Reader, check_space
from lead_ds.retrieval.encode import Encoding
from lead_ds.retrieval.encoded import encode_both
from lead_ds.retrieval.evaluate import Task, evaluating, measured
from lead_ds.retrieval.metrics import Scores
from lead_ds.retrieval.peers import ALONE, Peers


def evaluate_two(
    query: Reader,
    document: Reader,
    task: Task,
    *,
    batch_size: int = 64,
    peers: Peers = ALONE,
    quiet: bool = False,
    out: str | Path | None = None,
) -> Scores:
    """As `evaluate_model`, of two models in one space: one reads the queries, the other the passages.

    Raises InputError for vectors of different widths.
    """
    check_space(query, document)
    (scorer, encoder), (other, other_encoder), qrels = query, document, task.qrels(out)
    how, dataset = Encoding(batch_size, next(scorer.parameters()).device), task.dataset
    with evaluating(scorer), evaluating(other):
        reading: dict[str, Any] = {"peers": peers, "quiet": quiet, "documents": (other.ranked, other_encoder)}
        encoded = encode_both(scorer.ranked, encoder, dataset, list(qrels), how, **reading)
    return measured(encoded, task, qrels, out, quiet=quiet)
