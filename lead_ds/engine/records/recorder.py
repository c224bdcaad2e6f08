"""What a run reports: `metrics.jsonl`, DeepSpeed's monitors, callbacks, a progress bar or plain lines. Never a sync per step."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.distributed.signals import Stop
from lead_ds.engine.records.callbacks import Callback, Callbacks, RunFacts
from lead_ds.errors import RunError
from lead_ds.io.json_text import parse_json
from lead_ds.kernels.builds import take_builds
from lead_ds.losses.objective import ObjectiveOutput
from lead_ds.losses.selection import Layers
from lead_ds.settings.train import TrainConfig


class StepSums:
    """The detached statistics of a step's micro-batches, averaged on the device.

    rows: the teacher's and the student's layers that are compared, by the row that statistics of them stand in.
    """

    def __init__(self, rows: Mapping[str, Layers]) -> None:
        self.rows = rows
        self.names: list[str] = []
        self.vectors: list[tuple[str, str, int]] = []  # row, name and length
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, output: ObjectiveOutput) -> None:
        """Take one micro-batch in."""
        parts = {"loss": output.loss, **output.parts}
        vectors = [torch.stack([value.detach().float() for value in parts.values()])]
        self.names, self.vectors = list(parts), []
        for row, statistics in output.layers.items():
            for name, vector in statistics.items():
                vectors.append(vector.float())
                self.vectors.append((row, name, len(vector)))
        flat = torch.cat(vectors)
        self.sum = flat if self.sum is None else self.sum + flat
        self.count += 1

    def mean(self, ranks: Ranks, more: float = 0.0) -> Tensor:
        """[parts + statistics of layers + 1] averaged over micro-batches and ranks; the last is the ranks' mean of `more`."""
        assert self.sum is not None
        return ranks.mean(torch.cat([self.sum / self.count, self.sum.new_full((1,), more)]))

    def read(self, values: list[float]) -> tuple[dict[str, float], dict[str, dict[str, list[Any]]]]:
        """The parts by name, and the statistics of layers by row, of a mean that was read from the device."""
        parts, rest = dict(zip(self.names, values, strict=False)), values[len(self.names) :]
        rows: dict[str, dict[str, list[Any]]] = {}
        for row, name, length in self.vectors:
            if row not in rows:
                teacher, student = self.rows.get(row, ([], []))
                rows[row] = {"teacher": list(teacher), "student": list(student)}
            rows[row][name], rest = rest[:length], rest[length:]
        return parts, rows


class Recorder:
    """Keeps the statistics of steps on the device, and every `log_every` steps reads, checks and writes them at once."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        engine: Any,
        *,
        stop: Stop,
        train: TrainConfig,
        start: int,
        quiet: bool,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.folder, self.ranks, self.engine, self.stop = folder, ranks, engine, stop
        self.log_every, self.steps = train.log_every, train.steps
        self.callbacks = Callbacks(callbacks, ranks)
        self.pending: OrderedDict[int, tuple[Tensor, StepSums, float, Sequence[str]]] = OrderedDict()
        self.clock, self.queries = time.perf_counter(), 0
        self.progress = _Progress(start, train.steps) if ranks.main and not quiet else None
        if ranks.main:
            trim_metrics(folder / "metrics.jsonl", start)

    def step(self, step: int, sums: StepSums, lr: float, query_ids: Sequence[str]) -> None:
        """Take one finished step (1-based) in."""
        reduced = sums.mean(self.ranks, self.stop.wish())
        self.stop.reduced(reduced[-1])
        self.pending[step] = (reduced[:-1], sums, lr, query_ids)
        self.queries += len(query_ids) * self.ranks.world
        if step % self.log_every == 0 or step == self.steps:
            self.flush()
        elif self.progress:
            self.progress.update(step)

    def flush(self) -> None:
        """Read the pending steps from the device, stop on a loss that is not finite, write the rest.

        Raises RunError naming the first bad step and its queries.
        """
        if not self.pending:
            return
        rows: list[dict[str, Any]] = []
        for step, (vector, sums, lr, query_ids) in self.pending.items():
            parts, layers = sums.read(vector.tolist())
            loss = parts.pop("loss")
            if not math.isfinite(loss):
                shown = ", ".join(query_ids[:4]) + (" ..." if len(query_ids) > 4 else "")
                bad = [name for name, value in parts.items() if not math.isfinite(value)] or ["loss"]
                raise RunError(
                    f"step {step}",
                    f"the loss is not finite ({', '.join(bad)}) in the batch of queries {shown}",
                    "see the student's weights with lead-ds inspect, and these texts"
                    if step == 1
                    else "the last checkpoint is intact: lower train.lr, set teacher.scale=cosine, or inspect these texts, "
                    "then continue with --resume",
                )
            rows.append({"step": step, "loss": loss, "parts": parts, "lr": lr, **layers})
        self.pending.clear()
        now = time.perf_counter()
        rate = self.queries / max(now - self.clock, 1e-9)
        self.clock, self.queries = now, 0
        rows[-1]["queries_per_second"] = rate
        self._write(rows)
        for row in rows:
            metrics = {**row["parts"], **{name: value for name, value in row.items() if name != "parts"}}
            self.callbacks.tell(lambda callback: callback.on_step(metrics))  # noqa: B023 - called at once
        if builds := take_builds():  # every rank waited for them
            self.say(builds)
        if self.progress:
            self.progress.tell(rows[-1], rate)
        self.engine.monitor.write_events(
            [(f"train/{name}", row["parts"][name], row["step"]) for row in rows[-1:] for name in row["parts"]]
            + [("train/loss", rows[-1]["loss"], rows[-1]["step"]), ("train/lr", rows[-1]["lr"], rows[-1]["step"])]
            + [("train/queries_per_second", rate, rows[-1]["step"])]
        )

    def evaluation(
        self, step: int, values: dict[str, float], by_width: Mapping[int, dict[str, float]] | None = None
    ) -> None:
        """Record an evaluation; by_width: of the first dimensions of a student's vectors alone, as far as it is trained so."""
        self._write([{"step": step, "evaluation": values, **({"widths": by_width} if by_width else {})}])
        self.engine.monitor.write_events([(f"evaluation/{name}", value, step) for name, value in values.items()])
        self.callbacks.tell(lambda callback: callback.on_evaluation({"step": step, **values}))
        if self.progress:
            self.progress.line(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
        self.clock = time.perf_counter()  # the time that evaluating took is not training's

    def started(self, step: int, student: nn.Module) -> None:
        """Report that a run begins behind step `step`."""
        facts = RunFacts(self.folder, step, self.steps, self.ranks.rank, self.ranks.world, student)
        self.callbacks.tell(lambda callback: callback.on_start(facts))

    def checkpoint(self, path: Path) -> None:
        """Report a checkpoint."""
        self.callbacks.tell(lambda callback: callback.on_checkpoint(path))

    def ended(self, step: int) -> None:
        """Report that the run ends with step `step`."""
        self.callbacks.tell(lambda callback: callback.on_end(step))
        self.callbacks.asked()

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if self.progress:
            self.progress.line(text)

    def close(self) -> None:
        """End the progress bar."""
        if self.progress:
            self.progress.close()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not self.ranks.main:
            return
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        except OSError as error:
            remedy = "checkpoints are intact: make room and continue with --resume"
            raise RunError(path, f"cannot be written: {error.strerror}", remedy) from error


def _finite(value: Any) -> Any:
    """`value` with null for numbers that are not finite, such as a statistic of a loss that is switched off."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Progress:
    """A bar where a person watches, a line per log step where a file does."""

    def __init__(self, start: int, steps: int) -> None:
        self.steps = steps
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("", total=steps, completed=start, losses="")
            self.bar.start()

    def update(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def tell(self, row: dict[str, Any], rate: float) -> None:
        parts = "  ".join(f"{name} {value:.4f}" for name, value in row["parts"].items())
        losses = f"loss {row['loss']:.4f}  {parts}  {rate:.1f} queries/s"
        if self.bar:
            self.bar.update(self.task, completed=row["step"], losses=losses)
        else:
            print(f"step {row['step']}/{self.steps}  {losses}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def trim_metrics(path: Path, start: int) -> None:
    """Drop rows past step `start`, which a resumed run will write again, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if row.get("step", 0) <= start:
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(kept), "utf-8")
    partial.replace(path)
