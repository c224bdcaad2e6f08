"""The teachers one window ahead of the student, on a stream of its own: `train.overlap`.

A GPU that waits in one model's small kernels or gaps has room for the other's. The teacher of window t + 1 is started
before the student of window t. Each gives what it would have given in turn, for a frozen teacher depends on nothing
that a step changes. A replicated teacher communicates with nobody, so there is no order of collectives to get wrong; a
sharded one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch

from lead_ds.data.batches import Window
from lead_ds.errors import InputError
from lead_ds.losses.objective import Asked
from lead_ds.teachers.teacher import Teacher, TeacherView

T = TypeVar("T")


def answers(teachers: Sequence[Teacher], window: Window, asked: Asked) -> list[TeacherView | None]:
    """What each teacher gives for a window, by its one forward; None of one that does not teach now."""
    given = zip(teachers, window.teachers, asked.teachers, strict=True) if teachers else ()
    return [teacher.window(batches, layers, taps) if batches else None for teacher, batches, (layers, taps) in given]


class AheadTeachers:
    """Starts a window's forwards of the teachers early, and hands their views over when the student needs them."""

    def __init__(self, teachers: Mapping[str, Teacher], device: torch.device) -> None:
        """teachers: by their keys in the configuration. Raises InputError for a sharded one."""
        for key, teacher in teachers.items():
            if teacher.computes and teacher.placement != "replicate":
                what = (
                    f"the teacher's placement is {teacher.placement}: its gathers would meet the student's collectives"
                )
                raise InputError("train.overlap", what, f"set it to false, or {key}.placement=replicate")
        self.teachers = list(teachers.values())
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[int, list[TeacherView | None]] | None = None

    def begin(self, window: Window, asked: Asked) -> None:
        """Start a window's forward; on a CPU, where there is nothing to overlap, do it."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self._begun = window.step, answers(self.teachers, window, asked)

    def take(self, window: Window, asked: Asked) -> list[TeacherView | None]:
        """What was begun for `window`; begun now where it is a run's first."""
        if self._begun is None or self._begun[0] != window.step:
            self.begin(window, asked)
        assert self._begun is not None
        views, self._begun = self._begun[1], None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for features in (part for view in views if view is not None for part in (view.final, view.layers)):
                for tensor in [] if features is None else features.tensors():
                    tensor.record_stream(current)  # its memory is the other stream's to use again
        return views


def with_next(items: Iterator[T]) -> Iterator[tuple[T, T | None]]:
    """Each item and the one behind it."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following
        item = following
