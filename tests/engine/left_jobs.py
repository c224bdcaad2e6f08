"""Runs one after the other in one process, as a notebook makes them, and what is left of them there."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lead_ds.config import load_config
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.records.callbacks import Callback, RunFacts
from lead_ds.engine.training.distill import distill
from lead_ds.engine.training.given import Given
from lead_ds.errors import RunError
from lead_ds.models.load import load_student
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teacher import Lesson
from tests.engine.half_jobs import forced

HANGS = 120.0  # seconds; a child whose collector waits for threads that it has not would never end


class Kept(Callback):
    """Keeps the student, as a callback may; breaks the run at its first step where asked to."""

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks
        self.student: Any = None

    def on_start(self, run: RunFacts) -> None:
        self.student = run.student

    def on_step(self, metrics: dict[str, Any]) -> None:
        if self.breaks:
            raise ValueError("my own mistake")


def held() -> dict[str, Any]:
    """What this process holds: engines as they lie; after a collection, threads by name, open files, bytes of tensors."""
    engines = sum(isinstance(one, deepspeed.DeepSpeedEngine) for one in gc.get_objects())
    gc.collect()
    names = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return {
        "engines": engines,
        "threads": Counter(names),
        "files": len(os.listdir("/proc/self/fd")),
        "bytes": sum(storages.values()),
    }


def each(configs: dict[str, str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What is held after each round of every run, by the run's name."""
    forced()
    alone()
    gc.disable()  # what has gone went by what a run itself does
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for turn in range(rounds):
        for name, path in configs.items():
            config = load_config(path, [f"output={path}-{turn}"])
            try:
                distill(config, quiet=True, given=Given(callbacks=[Kept(breaks=name == "broken")]))
            except RunError:
                if name != "broken":
                    raise
            found[name].append(held())
    return found


def forks(trained: str, sharded: str) -> list[Any]:
    """How children end that collect the garbage of a run, of one that failed, and of a teacher in shards."""
    alone()
    gc.disable()  # so that each child finds all of it
    ended = []
    for breaks in (False, True):
        try:
            output = f"output={trained}-{breaks}"
            distill(load_config(trained, [output]), quiet=True, given=Given(callbacks=[Kept(breaks)]))
        except RunError:
            if not breaks:
                raise
        ended.append(child())
    with ranks() as here:
        teacher = build_teacher(Lesson.of(load_config(sharded)), here)
    assert teacher.placement == "zero3"
    del teacher
    return [*ended, child()]


def child() -> int | None:
    """The status of a forked process that collects its garbage; a signal's number, negative, where it had to be killed."""
    process = get_context("fork").Process(target=gc.collect)
    process.start()
    process.join(HANGS)
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    return process.exitcode


def kept_student(path: str) -> list[bool]:
    """Whether a student that a callback kept holds no group after its run, and is what was saved: by the attributes of its
    parameters, by gradients that stay where torch puts them, by its weights."""
    alone()
    callback = Kept()
    config = load_config(path)
    folder = distill(config, quiet=True, given=Given(callbacks=[callback]))
    saved = load_student(config.student.model_copy(update={"path": str(folder)}), torch.float32)
    parameters = dict(callback.student.named_parameters())
    sum(parameter.sum() for parameter in parameters.values()).backward()  # type: ignore[union-attr]
    return [
        held()["threads"] == Counter(["python"]),
        all(vars(parameters[name]).keys() <= vars(other).keys() for name, other in saved.named_parameters()),
        all(parameter.grad is not None for parameter in parameters.values() if parameter.requires_grad),
        all(torch.equal(parameters[name], other) for name, other in saved.named_parameters()),
    ]


def kept_shards(path: str) -> dict[str, int]:
    """The threads of a process in which a callback has kept a student that was in shards."""
    alone()
    callback = Kept()
    distill(load_config(path), quiet=True, given=Given(callbacks=[callback]))
    assert callback.student is not None
    return held()["threads"]


def alone() -> None:
    """Have this process forget its launcher: each run makes and leaves a group of its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
