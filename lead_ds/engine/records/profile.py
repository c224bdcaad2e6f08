"""`profile: true`: where the time of a run's steps goes, as tables for people and a trace for tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.phases import Phase, PhaseClock, mean_phases
from lead_ds.io.files import atomic
from lead_ds.io.provenance import device_name
from lead_ds.report.profile import profile_text
from lead_ds.settings.train import ProfileConfig

RANGE = "lead-ds: "  # before a phase's name in the trace
Spans = list[tuple[float, float]]


class Profile(PhaseClock):
    """Of the steps after `skip`, `steps` are timed by phase with nothing else switched on, the next `steps` traced on rank 0.

    Writes OUTPUT/profile/: `profile.txt`, `profile.json`, and `trace-rank0.json` for chrome://tracing or Perfetto.
    """

    def __init__(
        self, settings: ProfileConfig, output: Path, ranks: Ranks, say: Callable[[str], None], *, start: int
    ) -> None:
        super().__init__(ranks.device)
        self.settings, self.folder, self.ranks, self.say = settings, output / "profile", ranks, say
        self.start, self.ended = start, 0  # steps of the run before, and of this process
        self.times: list[dict[str, float]] = []
        self._tracer: Any = None
        self._range: Any = None

    def at(self, phase: Phase) -> None:
        if self._tracer is not None:
            self._leave()
            self._range = torch.profiler.record_function(RANGE + phase)
            self._range.__enter__()
        if self.settings.skip <= self.ended < self.settings.skip + 2 * self.settings.steps:
            super().at(phase)

    def end_step(self) -> None:
        self.ended += 1
        timed = self.settings.skip + self.settings.steps
        if self.settings.skip < self.ended <= timed + self.settings.steps:
            super().end_step()
        if self.ended == self.settings.skip:
            self.restart()
        elif self.ended == timed:
            self.times = self.seconds()
            self._start()
            self.restart()
        elif self.ended == timed + self.settings.steps:
            self._write()

    def close(self) -> None:
        if self.ended < self.settings.skip + 2 * self.settings.steps:  # the run was too short for all of it
            if not self.times:
                self.times = self.seconds()
            self._write()

    def _start(self) -> None:
        if not self.ranks.main:
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        tracer = torch.profiler.profile(activities=kinds)
        tracer.start()
        self._tracer = tracer

    def _leave(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _write(self) -> None:
        """Every rank calls this after the same step; rank 0 writes."""
        everyone = self.ranks.all(mean_phases(self.times) if self.times else {})
        if not self.ranks.main:
            return
        tracer, self._tracer = self._tracer, None
        if not self.times:
            self.say(f"profile: the run ended before {self.settings.skip} + 1 steps were over, nothing was timed")
            return
        facts = self._facts(everyone)
        if tracer is not None:
            self._leave()
            tracer.stop()
            if steps := self.seconds():
                facts |= read_trace(tracer, steps, self.settings.operators, self.device.type)
                with atomic(self.folder / "trace-rank0.json") as path:
                    tracer.export_chrome_trace(str(path))
        text = profile_text(facts)
        for name, content in (("profile.json", json.dumps(facts, indent=1) + "\n"), ("profile.txt", text)):
            with atomic(self.folder / name) as path:
                path.write_text(content, encoding="utf-8")
        self.say(f"{text}profile: {self.folder}")

    def _facts(self, everyone: list[dict[str, float]]) -> dict[str, Any]:
        steps = [1e3 * sum(step.values()) for step in self.times]
        phases = []
        for name, seconds in everyone[0].items():
            slowest = max(range(len(everyone)), key=lambda rank: everyone[rank].get(name, 0.0))
            slowest_ms = 1e3 * everyone[slowest].get(name, 0.0)
            phases.append({"part": name, "ms": 1e3 * seconds, "slowest_ms": slowest_ms, "slowest_rank": slowest})
        p50, p95 = np.percentile(steps, [50, 95]).tolist()
        return {
            "device": device_name(),
            "processes": self.ranks.world,
            "first_step": self.start + self.settings.skip + 1,
            "steps": len(steps),
            "step_ms": {"p50": p50, "p95": p95},
            "parts": phases,
            "traced_step_ms": None,
            "exposed_communication_ms": None,
            "operators": [],
        }


def read_trace(tracer: Any, steps: list[dict[str, float]], operators: int, device: str) -> dict[str, Any]:
    """Of traced steps: their mean time, the communication that nothing hid, and the costliest operators, all per step."""
    count = len(steps)
    where = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    talk, work = spans_of([event for event in tracer.events() if event.device_type == where])
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    averages = [row for row in tracer.key_averages() if row.device_type == where and not row.is_user_annotation]
    averages.sort(key=lambda row: getattr(row, field), reverse=True)
    return {
        "traced_step_ms": 1e3 * fmean([sum(step.values()) for step in steps]),
        "exposed_communication_ms": exposed(talk, work) / 1e3 / count,
        "operators": [
            {"name": row.key, "ms": getattr(row, field) / 1e3 / count, "calls": row.count / count}
            for row in averages[:operators]
        ],
    }


def spans_of(events: Iterable[Any]) -> tuple[Spans, Spans]:
    """Begin and end (microseconds) of a profiler's events of communication, and of computing."""
    talk: Spans = []
    work: Spans = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.name.startswith(("nccl", "gloo:")):
            talk.append(span)
        elif not event.is_user_annotation and not event.name.startswith("c10d::"):
            work.append(span)
    return talk, work


def exposed(talk: Spans, work: Spans) -> float:
    """How long something of `talk` went on while nothing of `work` did."""
    return total(merged([*talk, *work])) - total(merged(work))


def merged(spans: Spans) -> Spans:
    """The same stretches of time without overlap, in order."""
    result: Spans = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def total(spans: Spans) -> float:
    """The length of stretches that do not overlap."""
    return sum(end - begin for begin, end in spans)
