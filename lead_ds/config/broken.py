"""A rule that binds several sections, and what it says where a configuration breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lead_ds.settings.run import Run


class Broken(NamedTuple):
    """A rule that a configuration breaks: at which dotted key, what is wrong, what to do."""

    key: str
    what: str
    remedy: str


Rule = Callable[[Run], Iterator[Broken]]
