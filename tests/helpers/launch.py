"""Run a job on W real processes over gloo, as a launcher would start them, and collect what each of them returns.

Imports take longer than most jobs: a server imports once, and every process is forked from it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

from lead_ds.engine.distributed.ranks import free_port

ROOT = Path(__file__).parents[2]
# Read when torch and DeepSpeed are imported, so that the server must have them, too.
IMPORTED_WITH = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

_processes = get_context("forkserver")
_processes.set_forkserver_preload(["tests.helpers.imported"])


def launch(job: str, world: int, *, timeout: float = 900, **arguments: Any) -> list[Any]:
    """Call `package.module:function(**arguments)` on every process; each one's JSON result, in order of rank."""
    _serve()
    with tempfile.TemporaryDirectory() as folder:
        port = str(free_port())
        processes = []
        for rank in range(world):
            environment = {
                **os.environ,
                **IMPORTED_WITH,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            place = f"{folder}/{rank}"
            processes.append(_processes.Process(target=_work, args=(job, json.dumps(arguments), place, environment)))
            processes[-1].start()
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


def _serve() -> None:
    """Start the server that processes are forked from, where it does not run."""
    before = dict(os.environ)
    os.environ.update(IMPORTED_WITH)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(job: str, arguments: str, place: str, environment: dict[str, str]) -> None:
    """One process of a job: its result goes to `place`.json, what it prints to `place`.log."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    log = os.open(f"{place}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        module, _, name = job.partition(":")
        function = getattr(__import__(module, fromlist=[name]), name)
        Path(f"{place}.json").write_text(json.dumps(function(**json.loads(arguments))))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
