"""JSON whose only error is ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """`json.loads`. Raises ValueError, also for what is nested too deeply, where Python has another error.

    >>> parse_json("[" * 9999)
    Traceback (most recent call last):
    ValueError: nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def kind_of(value: object) -> str:
    """JSON's own word for a parsed value: RFC 8259, section 3."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
