"""Work done ahead of its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterator[Any], count: int) -> Iterator[Any]:
    """function(item) of every item, in order, computed up to `count` items ahead by the pool."""
    pending = []
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > count:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()
