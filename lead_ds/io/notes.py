"""Remarks for whoever runs the program: what was done with the input that they may not expect."""

from __future__ import annotations

import sys

_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a line on stderr, unless this process has printed the same one before."""
    if text not in _said:
        _said.add(text)
        print(text, file=sys.stderr, flush=True)
