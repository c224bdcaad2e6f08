"""What each setting of a composed configuration means: the one source of what may differ between two runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from lead_ds.settings.base import Meaning, Means, Section

RESULT = Means("result")


def means(section: Section) -> dict[str, Means]:
    """What each dotted key means, of sections as well as of the settings in them.

    A mark at a section holds for all in it that has none of its own.

    >>> from typing import Annotated
    >>> from lead_ds.settings.base import PACE
    >>> class Loop(Section): steps: int = 5; log_every: Annotated[int, PACE] = 1
    >>> {key: found.meaning for key, found in means(Loop()).items()}
    {'steps': 'result', 'log_every': 'pace'}
    """
    return dict(_walk(section, "", RESULT))


def keys_of(section: Section, *meanings: Meaning) -> set[str]:
    """The dotted keys that mean one of `meanings`."""
    return {key for key, found in means(section).items() if found.meaning in meanings}


def mark_of(field: FieldInfo, otherwise: Means = RESULT) -> Means:
    """What a field means by its own mark, or else what its section means."""
    return next((mark for mark in field.metadata if isinstance(mark, Means)), otherwise)


def _walk(section: Section, at: str, inherited: Means) -> Iterator[tuple[str, Means]]:
    for name, field in type(section).model_fields.items():
        key, mark = f"{at}{name}", mark_of(field, inherited)
        yield key, mark
        value: Any = getattr(section, name)
        if isinstance(value, Section):
            yield from _walk(value, f"{key}.", mark)
        for place, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, Section):
                yield from _walk(item, f"{key}.{place}.", mark)
