"""Runs under a launcher that tests harm: started, watched, and seen to be gone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from lead_ds.engine.distributed.ranks import free_port
from lead_ds.engine.records.recorder import trim_metrics
from tests.helpers.launch import ROOT

GONE = 300.0  # seconds after a fault in which every process must have ended


class Run:
    """`distill CONFIG` on two processes under DeepSpeed's launcher, or under launch/local.sh."""

    def __init__(self, config: Path, *more: str, script: bool = False, world: int = 2, **environment: str) -> None:
        self.config, self.output = config, Path(yaml.safe_load(config.read_text())["output"])
        self.log = config.with_suffix(".log")
        arguments = ["distill", str(config), *more]
        if script:
            command = [str(ROOT / "launch" / "local.sh"), *arguments]
        else:
            hosts = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(world))}).encode()).decode()
            command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={hosts}", "--node_rank=0"]
            command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module", "lead_ds", *arguments]
        settings = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHON": sys.executable,
            "PROCESSES": str(world),
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def told(self) -> str:
        """Everything that was printed."""
        return self.log.read_text()

    def alive(self) -> list[psutil.Process]:
        """Every process of the run that lives, wherever it hangs in the tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks' own processes, in order of rank."""
        found: dict[int, psutil.Process] = {}
        for process in self.alive():
            try:
                words, rank = process.cmdline(), process.environ().get("RANK")
                parent = process.parent()
                above = parent.cmdline() if parent else []
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if rank is not None and "lead_ds" in words and "deepspeed.launcher.launch" not in words and words != above:
                found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 600, nap: float = 0.02) -> None:
        """Wait for a condition while the run lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode} before {what}:\n{self.told[-3000:]}"
            )
            assert time.monotonic() < deadline, f"no {what}:\n{self.told[-3000:]}"
            time.sleep(nap)

    def until_step(self, step: int) -> None:
        """Wait until a step has been recorded."""
        self.until(lambda: steps_of(self.output) >= step, f"step {step}")

    def gone(self) -> int:
        """Wait for the end: the status, with nothing left of the run within a minute."""
        deadline = time.monotonic() + GONE
        try:
            status = self.process.wait(GONE)
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = [" ".join(process.cmdline()) for process in self.alive()]
            assert not left, f"outlived the run: {left}"
            return status
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever is left."""
        for process in self.alive():
            process.kill()


def steps_of(output: Path) -> int:
    """The last step that a run recorded."""
    try:
        lines = (output / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


def copy_run(config: Path, name: str, *, step: int, **sections: Any) -> Path:
    """A copy of a run as it was at `step`, and its configuration, changed in `sections`; the configuration's path."""
    tree = yaml.safe_load(config.read_text())
    source = Path(tree["output"])
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    target = Path(sections.get("output", source.with_name(name)))
    tree["output"] = str(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in ("config.yaml", "run.json", "metrics.jsonl"):
        shutil.copy(source / file, target)
    trim_metrics(target / "metrics.jsonl", step)
    (target / "checkpoints").mkdir()
    for checkpoint in sorted((source / "checkpoints").glob("step-*")):
        if int(checkpoint.name.split("-")[1]) <= step:
            shutil.copytree(checkpoint, target / "checkpoints" / checkpoint.name)
    path = config.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path
