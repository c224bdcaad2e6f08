"""What a configuration says of its models: which are trained, which losses each teacher feeds and when, what a kind is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lead_ds.settings.roles import Span, TeacherRole
from lead_ds.settings.run import Run


def trained(config: Run) -> Iterator[tuple[str, TeacherRole]]:
    """The models that the run trains, by section."""
    yield "student", config.student  # type: ignore[misc]
    if config.cotrained is not None:
        yield next(iter(config.taught)), config.cotrained


GIFTS: dict[Any, str] = {
    "layers": "layers to read",
    "features": "vectors",
    "attention": "attention maps",
    "final": "scores",
}


def fed(config: Run, teacher: Any) -> frozenset[str]:
    """The names of the losses with a weight that one of the run's teachers feeds.

    An only teacher feeds every loss that reads one. One of several feeds those that it names, or all that it can.
    """
    from lead_ds.teachers.open import teacher_class

    reading = frozenset(config.losses.needing(*GIFTS))
    if config.teacher is not None:
        return reading
    if teacher.losses is not None:
        return reading & frozenset(teacher.losses)
    lacking = set(GIFTS) - teacher_class(teacher.kind).given(teacher)
    return reading - frozenset(config.losses.needing(*lacking) if lacking else ())


def scoped(config: Run) -> Iterator[tuple[str, Any]]:
    """The losses with a weight whose `scope` says over which passages they are, by name: their sections."""
    return ((name, section) for name, (_, section) in config.losses.active.items() if hasattr(section, "scope"))


def span_of(teacher: Any) -> Span:
    """The steps at which a teacher teaches."""
    return Span(getattr(teacher, "after", 0), getattr(teacher, "until", None))


def phases(config: Run) -> list[int]:
    """The steps, from 0, at which the teachers that teach are others than before; the first among them."""
    spans = [span_of(teacher) for teacher in config.taught.values()]
    changes = {0, *(span.after for span in spans), *(span.until for span in spans if span.until is not None)}
    return sorted(step for step in changes if step < config.train.steps)


def reads_pairs(kind: str) -> bool:
    """Whether models of a kind read a query and a passage as one text."""
    from lead_ds.models.kinds.kind import KINDS

    return kind in KINDS and KINDS[kind].reads_pairs


def gives_vectors(kind: str) -> bool:
    """Whether models of a kind give one vector per text."""
    from lead_ds.models.kinds.kind import KINDS

    return kind in KINDS and KINDS[kind].gives_vectors


def is_sparse(kind: str) -> bool:
    """Whether models of a kind give sparse vectors."""
    from lead_ds.models.kinds.kind import KINDS

    return kind in KINDS and KINDS[kind].sparse


def computes(kind: str) -> bool:
    """Whether a teacher of a kind runs a model."""
    from lead_ds.teachers.open import teacher_class

    return teacher_class(kind).computes
