"""Which teacher a section asks for."""

from __future__ import annotations

from lead_ds.teachers.frozen import FrozenTeacher
from lead_ds.teachers.teacher import TEACHERS, Teacher


def teacher_class(kind: str) -> type[Teacher]:
    """The teacher of a `teacher.kind`: registered under that name, or else a frozen model of that kind."""
    if kind in TEACHERS:
        return TEACHERS[kind]
    return FrozenTeacher
