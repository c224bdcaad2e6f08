"""The training loop: windows in, optimizer steps out; evaluation, checkpoints and early stopping in between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.data.batches import Batches, Window
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.distributed.watchdog import Watchdog
from lead_ds.engine.records.checkpoint import Checkpoints
from lead_ds.engine.records.phases import Phase, Phases
from lead_ds.engine.records.recorder import Recorder, StepSums
from lead_ds.engine.training.ahead import AheadTeachers, answers, with_next
from lead_ds.engine.training.evaluation import Evaluator, Evaluators
from lead_ds.engine.training.lengths import Lengths, Longest
from lead_ds.engine.training.objective import Selected
from lead_ds.engine.training.schedule import learning_rate
from lead_ds.engine.training.step import Micro, RankScope, agreed, side_of, word_groups
from lead_ds.losses.objective import Asked
from lead_ds.teachers.finite import check_finite, say_constant
from lead_ds.teachers.teacher import Teacher, TeacherView


@dataclass(frozen=True)
class Bookkeeping:
    """What keeps account of a run: its checkpoints, its metrics, the watchdog over its steps, and its profile."""

    checkpoints: Checkpoints
    recorder: Recorder
    watchdog: Watchdog
    phases: Phases = field(default_factory=Phases)


class Training:
    """One run's moving parts. `state` is what a checkpoint remembered: step, best evaluation, evaluations since then, and
    whether the step's own evaluation is still owed."""

    def __init__(
        self,
        *,
        config: Config,
        ranks: Ranks,
        engine: Any,
        teachers: Mapping[str, Teacher],
        batches: Batches,
        evaluator: Evaluator | Evaluators | None,
        books: Bookkeeping,
        state: dict[str, Any],
    ) -> None:
        self.config, self.ranks, self.engine, self.teachers = config, ranks, engine, list(teachers.values())
        self.keys, self.checked = list(teachers), set[str]()  # which teachers were seen to give finite numbers
        self.batches, self.evaluator = batches, evaluator
        self.checkpoints, self.recorder = books.checkpoints, books.recorder
        self.watchdog, self.phases = books.watchdog, books.phases
        self.step: int = state.get("step", 0)
        self.owed: bool = state.get("owed", False)
        self.best: dict[str, Any] | None = state.get("best")
        self.worse: int = state.get("worse", 0)
        self.informative: list[list[int]] = state.get("informative", [])
        self.attention: dict[str, str] = state.get("attention", {})
        self.inputs: dict[str, str] = state.get("inputs", {})
        self.accepted: list[dict[str, Any]] = state.get("accepted", [])
        self.scope = RankScope.of(config.train.in_batch, ranks, batches.group_size, config.kernels, self.phases)
        self.trainee = engine.module
        early = config.train.overlap and any(teacher.computes for teacher in self.teachers)
        self.ahead = AheadTeachers(teachers, ranks.device) if early else None
        taught = self.teachers or ([] if self.trainee.teacher is None else [self.trainee.teacher])
        scorers = [getattr(teacher, "scorer", teacher) for teacher in taught]
        self.lengths = Lengths(ranks, [self.trainee.student, *scorers], self.scope.gathers)
        self.longest: list[Longest] = []
        self.selection = Selected.of(config, self.trainee.student, taught, self.informative or [[]] * len(taught))

    def run(self) -> dict[str, Any] | None:
        """Train to the last step, or until early stopping or a callback ends it; the best evaluation, if there was any.

        Raises Interrupted after the step at which a signal asks to stop, with a checkpoint of it.
        """
        train, callbacks = self.config.train, self.recorder.callbacks
        self.recorder.started(self.step, self.engine.module.student)
        if self.owed:
            self.owed = False
            self.evaluate()
            self.save()
        if train.patience and self.worse >= train.patience:
            return self.best
        with self.windows() as windows:
            for window, following in with_next(windows) if self.ahead else ((window, None) for window in windows):
                self.optimize(window, following)
                self.step += 1
                asked = callbacks.asked()
                last = asked or self.step == train.steps
                due = last or (train.evaluate_every > 0 and self.step % train.evaluate_every == 0)
                if self.recorder.stop.decided(now=due):
                    # An evaluation may take longer than a scheduler waits: it is made up for on resuming.
                    self.owed = due
                    self.save()
                    raise self.recorder.stop.interrupted(self.step)
                improved = self.evaluate() if due else False
                asked = callbacks.asked() or asked
                if self.step % train.save_every == 0 or last or improved or asked:
                    self.save()
                if callbacks.asked() or asked:
                    self.recorder.say(f"a callback requested a stop: stopping at step {self.step}")
                    break
                if train.patience and self.worse >= train.patience:
                    self.recorder.flush()
                    self.recorder.say(
                        f"no better {self.config.evaluation.metric} in {self.worse} evaluations: "
                        f"stopping at step {self.step}"
                    )
                    break
                self._at("waiting for data")
                self.phases.end_step()
        self.phases.close()
        self.recorder.ended(self.step)
        return self.best

    @contextmanager
    def windows(self) -> Iterator[Iterator[Window]]:
        """The windows that are left; their thread or workers end here, not when a traceback lets go of them."""
        windows = self.batches.windows(self.step, self.config.train.steps)
        self._at("waiting for data")
        try:
            yield windows
        finally:
            if hasattr(windows, "close"):
                windows.close()

    def optimize(self, window: Window, following: Window | None = None) -> None:
        """One optimizer step: the teachers' one forward for the window, then the student's micro-batches.

        following: the next step's window, where the teacher runs ahead.
        """
        step = self.step
        # Dropout depends on (seed, step, rank) only: a resumed run has no generator to restore.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4099 + self.ranks.rank)
        lr = self._set_learning_rate(step)
        asked = self._asked(step)
        self._at("teacher forward")
        if self.ahead is not None:
            views = self.ahead.take(window, asked)
            if following is not None:
                self.ahead.begin(following, self._asked(step + 1))
        else:
            views = answers(self.teachers, window, asked)
        for key, teacher, view, batches in zip(self.keys, self.teachers, views, window.teachers, strict=False):
            if view is not None and (key not in self.checked or step % self.config.train.log_every == 0):
                check_finite(key, teacher, view, batches, self.ranks)
                say_constant(key, view, self.batches.group_size, self.ranks)
                self.checked.add(key)
        with self.phases.inside("communication"):
            self.longest = self.lengths.agree(step, window)
        sums = StepSums(self.trainee.losses.rows(asked))
        for index in range(len(window.student)):
            self._at("student forward")
            output = self.engine(self.micro(window, index, asked, views))
            self._at("backward")
            self.engine.backward(output.loss)
            self._at("optimizer")
            self.engine.step()
            sums.add(output)
        self._at("statistics")
        self.recorder.step(step + 1, sums, lr, window.query_ids)

    def micro(self, window: Window, index: int, asked: Asked, views: Sequence[TeacherView | None]) -> Micro:
        """A window's micro-batch as the trained module takes it, with the frozen teachers' output for it."""
        device, batch, group_size = self.ranks.device, window.student[index], self.batches.group_size
        queries = len(window.query_ids) // len(window.student)
        first, last = index * queries, (index + 1) * queries
        keys: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.config.data.mask_duplicates:
            passages, positives = (
                window.passage_keys[first * group_size : last * group_size],
                window.positive_keys[first:last],
            )
            keys = passages.to(device, non_blocking=True), positives.to(device, non_blocking=True)
        groups = [
            word_groups(batches[index], batch, device) if captured.taps else (None, None)
            for batches, captured in zip(window.teachers, asked.teachers, strict=False)  # without a teacher, of none
        ]
        longest = self.longest[index] if self.longest else ()
        taught = [None if view is None else side_of(view, index, slice(first, last), group_size) for view in views]
        for place, agreed_on in enumerate(longest[1 : 1 + len(taught)]):
            found = taught[place]
            taught[place] = None if found is None else agreed(found, agreed_on)
        return Micro(
            batch.to(device),
            self.scope,
            asked,
            taught,
            window.teachers[0][index].to(device) if self.trainee.teacher is not None else None,
            keys,
            groups or [(None, None)],
            longest,
        )

    def evaluate(self) -> bool:
        """Evaluate the student; whether it is the best so far."""
        if self.evaluator is None:
            return False
        self.recorder.flush()
        self.watchdog.at(f"step {self.step}, evaluation", watched=False)
        self.phases.at("evaluation")
        values = self.evaluator(self.engine.module.student)
        self.engine.train()
        self.recorder.evaluation(self.step, values, self.evaluator.by_width)
        value = values[self.config.evaluation.metric]
        improved = self.best is None or value > self.best["value"]
        if improved:
            self.best = {"step": self.step, "value": value, "checkpoint": f"step-{self.step:08d}", "values": values}
        self.worse = 0 if improved else self.worse + 1
        return improved

    def save(self) -> None:
        """Write a checkpoint, after making sure that no loss up to here was broken."""
        self.recorder.flush()
        self.watchdog.at(f"step {self.step}, checkpoint")
        self.phases.at("checkpoint")
        state = {
            "step": self.step,
            "owed": self.owed,
            "best": self.best,
            "worse": self.worse,
            "informative": self.informative,
            "attention": self.attention,
            "inputs": self.inputs,
            "accepted": self.accepted,
            "processes": self.ranks.world,
            "config": self.config.model_dump(mode="json"),
        }
        path = self.checkpoints.save(self.engine, self.step, state, self.best)
        self.recorder.checkpoint(path)

    def _at(self, phase: Phase) -> None:
        self.watchdog.at(f"step {self.step + 1}, {phase}")
        self.phases.at(phase)

    def _set_learning_rate(self, step: int) -> float:
        factor = learning_rate(step, self.config.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group.get("base_lr", self.config.train.lr) * factor
        return self.config.train.lr * factor

    def _asked(self, step: int) -> Asked:
        teaching = [place for place, span in enumerate(self.config.spans().values()) if span.holds(step)]
        return self.trainee.losses.asked(self.selection.pairs(step), step, teaching)
