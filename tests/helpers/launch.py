"""Run a job on W real processes over gloo, as a launcher would start them, and collect what each of them returns."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

from lead_ds.engine.distributed.ranks import free_port
from tests.helpers.forked import IMPORTED_WITH, ROOT, become, forked

__all__ = ["ROOT", "launch"]


def launch(job: str, world: int, *, timeout: float = 900, **arguments: Any) -> list[Any]:
    """Call `package.module:function(**arguments)` on every process; each one's JSON result, in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        everywhere = {**os.environ, **IMPORTED_WITH, **place, "LOCAL_WORLD_SIZE": str(world)}
        processes = []
        for rank in range(world):
            environment = {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(forked(_work, job, json.dumps(arguments), f"{folder}/{rank}", environment))
        failed = []
        try:
            for rank, process in enumerate(processes):
                process.join(timeout)
                if process.exitcode != 0:
                    failed.append(rank)
                    break  # the others wait for it in a collective
        finally:
            for process in processes:
                process.kill()
                process.join()
        if failed:
            logs = "\n".join(f"--- rank {r}\n" + (Path(folder) / f"{r}.log").read_text()[-4000:] for r in range(world))
            raise AssertionError(f"{job} failed on rank {failed[0]}\n{logs}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _work(job: str, arguments: str, place: str, environment: dict[str, str]) -> None:
    """One process of a job: its result goes to `place`.json, what it prints to `place`.log."""
    become(environment, f"{place}.log", f"{place}.log")
    try:
        module, _, name = job.partition(":")
        function = getattr(__import__(module, fromlist=[name]), name)
        Path(f"{place}.json").write_text(json.dumps(function(**json.loads(arguments))))
    except BaseException:
        traceback.print_exc()
        raise
