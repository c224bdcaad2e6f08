"""What a thread waits in: a collective operation, a lock file of compilers and caches, or a compiler."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist

# Where a lock is waited for: the end of the source's name, the function, and the attribute that has the file's name.
_LOCKS = (("file_baton.py", "wait", "lock_file_path"), ("filelock/_api.py", "acquire", "lock_file"))


def collective(thread: int) -> str | None:
    """The collective operation that a thread is in, by its Python frames; None outside of any."""
    for frame in _frames(thread):
        if frame.f_code.co_filename.endswith("distributed_c10d.py") and not frame.f_code.co_name.startswith("_"):
            name = frame.f_code.co_name
            if name != "wrapper":
                return name
    return None


def issued() -> int:
    """How many collective operations this process has issued, in all of its groups, whether they are done or not."""
    if not dist.is_initialized():
        return 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def lock_file(thread: int) -> str | None:
    """The lock file that a thread waits for, by its Python frames: PyTorch's baton of compilers, or filelock's."""
    for frame in _frames(thread):
        for name, function, attribute in _LOCKS:
            if frame.f_code.co_name == function and frame.f_code.co_filename.replace(os.sep, "/").endswith(name):
                found = getattr(frame.f_locals.get("self"), attribute, None)
                return None if found is None else str(found)
    return None


def compiling(thread: int) -> str | None:
    """The folder in which a thread has an operator of DeepSpeed's or PyTorch's compiled; None where it does not."""
    for frame in _frames(thread):
        if frame.f_code.co_name == "_run_ninja_build":
            return str(frame.f_locals.get("build_directory"))
    return None


def _frames(thread: int) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back
