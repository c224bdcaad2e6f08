"""Lock files that compilers leave behind, and who has them open."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def batons(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """PyTorch's lock files below some folders: path, age in seconds, and whether a process of this machine has it open.

    One that nobody has open was left by a process that was killed, here or on another host of the same home, and whoever
    compiles there waits for ever.
    """
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob("lock") if path.is_file()]
    opened = open_files() if found else set()
    now = time.time()
    return [
        {"path": str(path), "age": now - path.stat().st_mtime, "held": os.path.realpath(path) in opened}
        for path in found
        if path.exists()
    ]


def open_files() -> set[str]:
    """The files that processes of this machine have open, of those that may be looked at."""
    found: set[str] = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(descriptor))
        except OSError:  # it has ended, or is another user's
            continue
    return found
