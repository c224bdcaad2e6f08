"""Watch a run from Python, and end it early.

    python examples/callbacks.py TEACHER STUDENT DATA OUTPUT

DATA: a folder with corpus.jsonl, queries.jsonl, train.jsonl and qrels/dev.tsv.
"""

import sys
from pathlib import Path
from typing import Any

from lead_ds import Callback, Distiller, load, losses


class Curve(Callback):
    """Keeps losses and evaluations, to be plotted afterwards."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: dict[int, float] = {}

    def on_step(self, metrics: dict[str, Any]) -> None:
        self.losses.append(metrics["loss"])

    def on_evaluation(self, metrics: dict[str, Any]) -> None:
        self.evaluations[metrics["step"]] = metrics["nDCG@10"]


class GoodEnough(Callback):
    """Ends the run at a quality: it then writes a checkpoint and the student, and could be resumed."""

    def __init__(self, at_least: float) -> None:
        self.at_least = at_least

    def on_evaluation(self, metrics: dict[str, Any]) -> bool:
        return metrics["nDCG@10"] >= self.at_least

    def on_checkpoint(self, path: Path) -> None:
        print("checkpoint:", path.name)


teacher, student, data, output = sys.argv[1:]
curve = Curve()
run = Distiller(
    teacher=load(teacher, max_length=64),
    student=student,
    data=data,
    losses=[losses.Response(), losses.Contrastive()],
    callbacks=[curve, GoodEnough(0.99)],
    steps=12,
    batch_size=4,
    negatives=3,
    evaluate_every=4,
    log_every=2,
    output=output,
).train()
print(f"{len(curve.losses)} steps, the last loss {curve.losses[-1]:.3f}; nDCG@10 by step: {curve.evaluations}")
print("on the test split:", run.evaluate(split="test", measures=["nDCG@10", "R@5"]))
