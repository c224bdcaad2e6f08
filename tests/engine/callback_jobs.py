"""Runs with callbacks, in a group of processes: what each process's callbacks were told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds.config import load_config
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.records.callbacks import Callback, RunFacts
from lead_ds.engine.training.distill import distill
from lead_ds.engine.training.given import Given
from lead_ds.errors import LeadError


class Watch(Callback):
    """Notes what it is told; asks to stop, or raises, where `at` says."""

    def __init__(self, at: tuple[str, int] | None = None, error: bool = False) -> None:
        self.at, self.error = at, error
        self.told: list[Any] = []

    def note(self, event: str, step: int, *more: Any) -> bool:
        self.told.append([event, step, *more])
        if self.error and (event, step) == self.at:
            raise ValueError("my own mistake")
        return (event, step) == self.at

    def on_start(self, run: RunFacts) -> bool:
        assert run.student.num_layers == 3
        return self.note("start", run.step, run.steps, run.processes)

    def on_step(self, metrics: dict[str, Any]) -> bool:
        return self.note("step", metrics["step"], metrics["loss"], metrics["response"], metrics["lr"])

    def on_evaluation(self, metrics: dict[str, Any]) -> bool:
        return self.note("evaluation", metrics["step"], metrics["nDCG@10"])

    def on_checkpoint(self, path: Path) -> bool:
        assert (path / "manifest.json").exists()
        return self.note("checkpoint", int(path.name.split("-")[1]))

    def on_end(self, step: int) -> bool:
        return self.note("end", step)


class WatchAll(Watch):
    every_rank = True


def watched(cases: list[dict[str, Any]]) -> list[Any]:
    """Of each case: what the callback was told, and the error that ended the run, if one did."""
    results: list[Any] = []
    with ranks() as here:
        for case in cases:
            kind = WatchAll if case.get("all") else Watch
            at = tuple(case["at"]) if case.get("at") and here.rank == case.get("rank", 0) else None
            watch, error = kind(at, case.get("error", False)), ""  # type: ignore[arg-type]
            try:
                given = Given(callbacks=[watch])
                distill(load_config(case["config"]), quiet=True, given=given, resume=case.get("resume", False))
            except LeadError as raised:
                error = str(raised)
            results.append([watch.told, error])
    return results
