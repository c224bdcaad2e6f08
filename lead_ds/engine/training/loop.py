"""The training loop: windows in, optimizer steps out; evaluation, checkpoints and early stopping in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.data.batches import Batches, Window
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.distributed.watchdog import Watchdog
from lead_ds.engine.records.checkpoint import Checkpoints
from lead_ds.engine.records.parts import Part, Parts
from lead_ds.engine.records.recorder import Recorder, StepSums
from lead_ds.engine.training.ahead import AheadTeacher, with_next
from lead_ds.engine.training.evaluation import Evaluator
from lead_ds.engine.training.schedule import learning_rate
from lead_ds.engine.training.step import Pair, Scope, make_views, word_groups
from lead_ds.losses.attention import pair_taps
from lead_ds.losses.objective import Objective
from lead_ds.losses.selection import select_layers
from lead_ds.models.scorer import Output
from lead_ds.teachers.teacher import Teacher, TeacherView


class Training:
    """One run's moving parts. `state` is what a checkpoint remembered: step, best evaluation, evaluations since then, and
    whether the step's own evaluation is still owed."""

    def __init__(
        self,
        *,
        config: Config,
        ranks: Ranks,
        engine: Any,
        teacher: Teacher | None,
        batches: Batches,
        checkpoints: Checkpoints,
        recorder: Recorder,
        evaluator: Evaluator | None,
        watchdog: Watchdog,
        state: dict[str, Any],
        parts: Parts | None = None,
    ) -> None:
        self.config, self.ranks, self.engine, self.teacher = config, ranks, engine, teacher
        self.batches, self.checkpoints, self.recorder, self.evaluator = batches, checkpoints, recorder, evaluator
        self.watchdog, self.parts = watchdog, parts or Parts()
        self.step: int = state.get("step", 0)
        self.owed: bool = state.get("owed", False)
        self.best: dict[str, Any] | None = state.get("best")
        self.worse: int = state.get("worse", 0)
        self.informative: list[int] = state.get("informative", [])
        self.inputs: dict[str, str] = state.get("inputs", {})
        self.scope = Scope.of(config, ranks, batches.group, self.parts)
        cotrained = engine.module.teacher
        self.objective = Objective(
            config.losses, impl=config.kernels, cotrain=cotrained is not None, mean=self.scope.mean
        )
        early = config.train.overlap and teacher is not None and teacher.computes
        self.ahead = AheadTeacher(teacher, ranks.device) if early and teacher is not None else None
        taught_by = teacher if teacher is not None else cotrained
        self.teacher_depth = taught_by.num_layers if taught_by is not None else 0
        self.readable = teacher.readable if teacher is not None else list(range(self.teacher_depth))
        self.student_depth = engine.module.student.num_layers

    def run(self) -> dict[str, Any] | None:
        """Train to the last step, or until early stopping or a callback ends it; the best evaluation, if there was any.

        Raises Interrupted after the step at which a signal asks to stop, with a checkpoint of it.
        """
        train, callbacks = self.config.train, self.recorder.callbacks
        self.recorder.started(self.step, self.engine.module.student)
        if self.owed:
            self.owed = False
            self.save(self.evaluate())
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
                    self.save(False)
                    raise self.recorder.stop.interrupted(self.step)
                improved = self.evaluate() if due else False
                asked = callbacks.asked() or asked
                if self.step % train.save_every == 0 or last or improved or asked:
                    self.save(improved)
                if callbacks.asked() or asked:
                    self.recorder.say(f"a callback asked to stop: stopping at step {self.step}")
                    break
                if train.patience and self.worse >= train.patience:
                    self.recorder.flush()
                    self.recorder.say(
                        f"no better {self.config.evaluation.metric} in {self.worse} evaluations: "
                        f"stopping at step {self.step}"
                    )
                    break
                self._at("waiting for data")
                self.parts.end_step()
        self.parts.close()
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
        """One optimizer step: the teacher's one forward for the window, then the student's micro-batches.

        following: the next step's window, where the teacher runs ahead.
        """
        config, step = self.config, self.step
        # Dropout depends on (seed, step, rank) only: a resumed run has no generator to restore.
        torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + self.ranks.rank)
        lr = self._set_learning_rate(step)
        teacher_layers, student_layers = self._layers("layer", step)
        teacher_taps, student_taps = self._layers("attention", step)
        self._at("teacher forward")
        if self.ahead is not None:
            view: TeacherView | None = self.ahead.take(window, teacher_layers)
            if following is not None:
                self.ahead.begin(following, self._layers("layer", step + 1)[0])
        else:
            view = self.teacher.window(window.teacher, teacher_layers, teacher_taps) if self.teacher else None
        sums = StepSums()
        done = 0
        for index, batch in enumerate(window.student):
            queries = len(window.query_ids) // len(window.student)
            self._at("student forward")
            student, cotrained = self.engine(
                batch.to(self.ranks.device),
                student_layers,
                student_taps,
                window.teacher[index].to(self.ranks.device) if self.engine.module.teacher is not None else None,
                teacher_layers,
                teacher_taps,
            )
            self.parts.at("losses")
            views = make_views(
                Pair(student.final, student.layers),
                self._teacher_pair(view, cotrained, done, queries),
                self.scope,
                self._mask(window, done, queries),
                contrastive_group=config.losses.contrastive.scope == "group",
                cotrained=cotrained is not None,
            )
            if student_taps:
                groups = word_groups(window.teacher[index], batch, self.ranks.device)
                views.attention = pair_taps(self._teacher_output(view, cotrained, index), student, groups)
            output = self.objective(views)
            self._at("backward")
            self.engine.backward(output.loss)
            self._at("optimizer")
            self.engine.step()
            sums.add(output)
            done += queries
        self._at("statistics")
        meta = {"lr": lr, "teacher_layers": list(teacher_layers), "student_layers": list(student_layers)}
        self.recorder.step(step + 1, sums, meta, window.query_ids, done)

    def evaluate(self) -> bool:
        """Evaluate the student; whether it is the best so far."""
        if self.evaluator is None:
            return False
        self.recorder.flush()
        self.watchdog.at(f"step {self.step}, evaluation", watched=False)
        self.parts.at("evaluation")
        values = self.evaluator(self.engine.module.student)
        self.engine.train()
        self.recorder.evaluation(self.step, values)
        value = values[self.config.evaluation.metric]
        improved = self.best is None or value > self.best["value"]
        if improved:
            self.best = {"step": self.step, "value": value, "checkpoint": f"step-{self.step:08d}", "values": values}
        self.worse = 0 if improved else self.worse + 1
        return improved

    def save(self, improved: bool) -> None:
        """Write a checkpoint, after making sure that no loss up to here was broken."""
        self.recorder.flush()
        self.watchdog.at(f"step {self.step}, checkpoint")
        self.parts.at("checkpoint")
        lens = self.teacher.lens_facts if self.teacher is not None else None
        state = {
            "step": self.step,
            "owed": self.owed,
            "best": self.best,
            "worse": self.worse,
            "informative": self.informative,
            "inputs": self.inputs,
            "lens": lens["checksum"] if lens else None,
            "processes": self.ranks.world,
            "config": self.config.model_dump(mode="json"),
        }
        path = self.checkpoints.save(self.engine, self.step, state, best=self.best if improved else None)
        self.recorder.checkpoint(path)

    def _at(self, part: Part) -> None:
        self.watchdog.at(f"step {self.step + 1}, {part}")
        self.parts.at(part)

    def _set_learning_rate(self, step: int) -> float:
        factor = learning_rate(step, self.config.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group.get("base_lr", self.config.train.lr) * factor
        return self.config.train.lr * factor

    def _layers(self, name: str, step: int) -> tuple[list[int], list[int]]:
        loss = getattr(self.config.losses, name)
        if loss.weight == 0 or self.teacher_depth == 0:
            return [], []
        depth, seed = (self.teacher_depth, self.student_depth), self.config.seed
        return select_layers(loss, *depth, seed=seed, step=step, informative=self.informative, stored=self.readable)

    def _teacher_pair(
        self, view: TeacherView | None, cotrained: Output | None, start: int, queries: int
    ) -> Pair | None:
        if cotrained is not None:
            return Pair(cotrained.final, cotrained.layers)
        if view is None:
            return None
        group, stop = self.batches.group, start + queries
        return Pair(
            view.final.micro(start, stop, group), view.layers.micro(start, stop, group) if view.layers else None
        )

    def _teacher_output(self, view: TeacherView | None, cotrained: Output | None, index: int) -> Output:
        if cotrained is not None:
            return cotrained
        assert view is not None
        return view.outputs[index]

    def _mask(self, window: Window, start: int, queries: int) -> torch.Tensor | None:
        if not self.config.data.mask_duplicates:
            return None
        group, device = self.batches.group, self.ranks.device
        keys = window.passage_keys[start * group : (start + queries) * group].to(device, non_blocking=True)
        return self.scope.mask(keys, window.positive_keys[start : start + queries].to(device, non_blocking=True))
