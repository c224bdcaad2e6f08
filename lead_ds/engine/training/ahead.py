"""The teacher one window ahead of the student, on a stream of its own: `train.overlap`.

A GPU that waits in one model's small kernels or gaps has room for the other's. The teacher of window t + 1 is started
before the student of window t. Each gives what it would have given in turn, for a frozen teacher depends on nothing
that a step changes. A replicated teacher communicates with nobody, so there is no order of collectives to get wrong; a
sharded one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch

from lead_ds.data.batches import Window
from lead_ds.errors import InputError
from lead_ds.teachers.teacher import Teacher, TeacherView

T = TypeVar("T")


class AheadTeacher:
    """Starts a window's teacher forward early, and hands its view over when the student needs it."""

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        """Raises InputError for a sharded teacher."""
        if teacher.placement != "replicate":
            what = f"the teacher's placement is {teacher.placement}: its gathers would meet the student's collectives"
            raise InputError("train.overlap", what, "set it to false, or teacher.placement=replicate")
        self.teacher = teacher
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[int, TeacherView] | None = None

    def begin(self, window: Window, layers: Sequence[int]) -> None:
        """Start a window's forward; on a CPU, where there is nothing to overlap, do it."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            self._begun = window.step, self.teacher.window(window.teacher, layers)

    def take(self, window: Window, layers: Sequence[int]) -> TeacherView:
        """What was begun for `window`; begun now where it is a run's first."""
        if self._begun is None or self._begun[0] != window.step:
            self.begin(window, layers)
        assert self._begun is not None
        view, self._begun = self._begun[1], None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for features in (view.final, view.layers):
                for tensor in [] if features is None else features.tensors():
                    tensor.record_stream(current)  # its memory is the other stream's to use again
        return view


def with_next(items: Iterator[T]) -> Iterator[tuple[T, T | None]]:
    """Each item and the one behind it."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following
        item = following
