"""What the tests of faults run on several processes, beside `jobs.py`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lead_ds.config import load_config
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.records import checkpoint
from lead_ds.engine.training.distill import distill
from lead_ds.errors import LeadError
from tests.engine.jobs import losses_of


def run_each(configs: list[str], resume: list[str] = []) -> list[Any]:  # noqa: B006
    """Run the first and continue the second configurations, one after the other, in one group of processes: the losses of
    each, or the error that ended it."""
    results: list[Any] = []
    with ranks():
        for path in [*configs, *resume]:
            config = load_config(path)
            try:
                distill(config, resume=path in resume, quiet=True)
                results.append(losses_of(Path(config.output)))
            except LeadError as error:
                results.append([error.status, str(error)])
    return results


def run_apart(cases: list[list[str]]) -> list[Any]:
    """Every case gives each rank a configuration of its own: the error that each rank raises."""
    results: list[Any] = []
    with ranks() as here:
        for case in cases:
            try:
                distill(load_config(case[here.rank]), quiet=True)
                results.append("it ran")
            except LeadError as error:
                results.append([error.status, str(error)])
    return results


def evaluations(configs: list[str]) -> list[Any]:
    """The evaluation rows of each configuration's run."""
    run_each(configs)
    found = []
    for path in configs:
        rows = (Path(load_config(path).output) / "metrics.jsonl").read_text().splitlines()
        found.append([row["evaluation"] for row in map(json.loads, rows) if "evaluation" in row])
    return found


def stop_and_resume(whole: str, stopped: str, step: int) -> list[Any]:
    """Run `whole`; run `stopped` with a SIGTERM to this process once `step` is recorded, and continue it: how it ended,
    and the rows of both runs, without speeds."""
    from tests.engine.running import steps_of

    output = Path(load_config(stopped).output)

    def terminate() -> None:
        while steps_of(output) < step:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    ended: list[Any] = []
    with ranks():
        distill(load_config(whole), quiet=True)
        threading.Thread(target=terminate, daemon=True).start()
        try:
            distill(load_config(stopped), quiet=True)
        except LeadError as error:
            ended = [error.status, str(error)]
        distill(load_config(stopped), resume=True, quiet=True)
    rows = []
    for config in (whole, stopped):
        lines = (Path(load_config(config).output) / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k != "queries_per_second"} for line in lines])
    return [ended, *rows]


def killed_before_its_best_is_written(config: str) -> list[str]:
    """Run a configuration that ends where best.json would be written, and continue it: the checkpoints that are left."""
    write = checkpoint.write_json

    def end(path: Path, value: Any) -> None:
        if path.name == checkpoint.BEST:
            path.with_name(path.name + ".tmp").touch()
            raise KeyboardInterrupt
        write(path, value)

    with ranks():
        checkpoint.write_json = end
        try:
            distill(load_config(config), quiet=True)
        except KeyboardInterrupt:
            checkpoint.write_json = write
        distill(load_config(config), resume=True, quiet=True)
    return sorted(path.name for path in Path(load_config(config).output, "checkpoints").iterdir())
