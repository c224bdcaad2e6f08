"""Run a job on W real processes over gloo, as a launcher would start them, and collect what each of them returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lead_ds.engine.distributed.ranks import free_port

ROOT = Path(__file__).parents[2]


def launch(job: str, world: int, *, timeout: float = 900, **arguments: Any) -> list[Any]:
    """Call `package.module:function(**arguments)` on every process; each one's JSON result, in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        port = str(free_port())
        processes = []
        for rank in range(world):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": str(ROOT),
            }
            command = [
                sys.executable,
                "-m",
                "tests.helpers.launch",
                job,
                json.dumps(arguments),
                f"{folder}/{rank}.json",
            ]
            log = (Path(folder) / f"{rank}.log").open("w")
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
        failed = []
        try:
            for rank, process in enumerate(processes):
                if process.wait(timeout):
                    failed.append(rank)
                    break  # the others wait for it in a collective
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            logs = "\n".join(f"--- rank {r}\n" + (Path(folder) / f"{r}.log").read_text()[-4000:] for r in range(world))
            raise AssertionError(f"{job} failed on rank {failed[0]}\n{logs}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def _main() -> None:
    job, arguments, out = sys.argv[1:]
    module, _, name = job.partition(":")
    function = getattr(__import__(module, fromlist=[name]), name)
    result = function(**json.loads(arguments))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
