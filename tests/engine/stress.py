"""Kill a run N times at random moments, continue it each time, and hold its losses against a run that nothing happened to.

    python -m tests.engine.stress 500 --seed 7

The moment is anywhere: while processes join, models load, a step or a checkpoint is under way, the student is exported. One
rank is killed, or all at once as by a power cut. After each: all are gone within a minute, every checkpoint is whole, none
that was complete is lost. Ranks are forked from this process, which has imported everything: a start takes a second.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from lead_ds.engine.distributed.ranks import free_port
from lead_ds.engine.records.checkpoint import damage
from tests.engine.jobs import losses_of
from tests.engine.running import GONE, steps_of
from tests.helpers.rooms import make_rooms, settings

STEPS, WORLD, KEEP = 24, 2, 3


class Job:
    """One attempt at a run: WORLD forked ranks."""

    def __init__(self, config: Path, resume: bool) -> None:
        port = str(free_port())
        self.log = config.with_suffix(".log")
        self.pids = [self._fork(config, resume, rank, port) for rank in range(WORLD)]
        self.statuses: dict[int, int] = {}

    def _fork(self, config: Path, resume: bool, rank: int, port: str) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(WORLD),
                LOCAL_WORLD_SIZE=str(WORLD),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            from lead_ds.cli import main

            torch.set_num_threads(1)
            main(["distill", str(config), "--quiet", *(["--resume"] if resume else [])])
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == WORLD

    def kill(self, ranks: list[int], number: int) -> None:
        for rank in ranks:
            if rank not in self.statuses:
                os.kill(self.pids[rank], number)

    def wait(self, seconds: float) -> bool:
        """Wait for all, so long at most; whether all have ended."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True


def whole(output: Path) -> list[str]:
    """Names of the run's complete checkpoints; raises where one is damaged."""
    found = sorted(output.glob("checkpoints/step-*[0-9]"))
    broken = {path.name: damage(path) for path in found if damage(path) is not None}
    assert not broken, broken
    return [path.name for path in found]


def stress(kills: int, seed: int, folder: Path, say: bool = False) -> dict[str, int]:
    """Kill `kills` times; how many runs that took and how often each phase of a run was hit. AssertionError on any loss."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    import deepspeed  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lead_ds.engine.training.distill  # noqa: F401

    rooms = folder / "rooms"
    # The models are made by another process: this one must not have begun to compute when it forks.
    if (pid := os.fork()) == 0:
        make_rooms(rooms)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

    def configuration(name: str) -> Path:
        path = folder / f"{name}.yaml"
        train = {"steps": STEPS, "batch_size": 2, "save_every": 2, "keep": KEEP}
        tree = settings(
            rooms, folder / name, extra_teacher={"placement": "zero3"}, student={"path": "dropout"}, train=train
        )
        path.write_text(yaml.safe_dump(tree))
        return path

    reference = configuration("reference")
    began = time.monotonic()
    job = Job(reference, False)
    job.wait(300)
    assert job.statuses == {0: 0, 1: 0}, job.log.read_text()[-3000:]
    duration = time.monotonic() - began
    losses = losses_of(folder / "reference")

    dice = random.Random(seed)
    done = runs = 0
    hit = {"before the first step": 0, "in a checkpoint": 0, "in a step": 0}
    while done < kills or runs == 0:
        config = configuration(f"run{runs}")
        output = config.with_suffix("")
        while True:
            resume = (output / "config.yaml").exists()
            before = whole(output)
            start = steps_of(output)
            job = Job(config, resume)
            if done == kills:  # the run is left to finish
                job.wait(GONE * 5)
                break
            # Most of an attempt is its start: two kills of three wait for the first step, or for a checkpoint under way.
            aim = dice.choice(["anywhere", "step", "checkpoint"])
            began = time.monotonic()
            while aim != "anywhere" and steps_of(output) <= start and not job.poll():
                time.sleep(0.01)
            moment = dice.uniform(0, duration * (1.1 if aim == "anywhere" else 0.3))
            if job.wait(moment):
                break
            while aim == "checkpoint" and not list(output.glob("checkpoints/*.partial")) and not job.poll():
                time.sleep(0.0005)
            if job.poll():
                break
            moment = time.monotonic() - began
            victims = dice.choice([[0], [1], [0, 1]])
            job.kill(victims, signal.SIGKILL)
            done += 1
            told = f"seed {seed}, kill {done} of ranks {victims} after {moment:.3f} s of run {runs}"
            saving = bool(list(output.glob("checkpoints/*.partial")))
            hit[
                "in a checkpoint" if saving else "in a step" if steps_of(output) > start else "before the first step"
            ] += 1
            if not job.wait(2):
                job.kill([0, 1], signal.SIGTERM)  # as a launcher does that notices
            ended = job.wait(GONE - 20)
            if not ended:
                job.kill([0, 1], signal.SIGKILL)
            assert ended, f"{told}: a rank outlived it\n{job.log.read_text()[-3000:]}"
            after = whole(output)
            lost = [name for name in before if name not in after and name not in after[: -KEEP or None]]
            assert not lost or (len(after) >= KEEP and max(lost) < min(after)), (
                f"{told}: lost {lost} of {before}, {after}"
            )
            if say:
                print(f"{told}: step {steps_of(output)}, {len(after)} checkpoints", flush=True)
        if set(job.statuses.values()) != {0}:
            raise AssertionError(f"seed {seed}, after kill {done}: {job.statuses}\n{job.log.read_text()[-3000:]}")
        assert losses_of(output) == losses, f"seed {seed}: run {runs} differs from the run that nothing happened to"
        runs += 1
    return {"kills": done, "runs": runs, **hit}


def main() -> None:
    """Parse arguments, run, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--quiet", action="store_true", help="only the counts at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lead-ds-stress-") as folder:
        print(stress(arguments.kills, arguments.seed, Path(folder), say=not arguments.quiet))


if __name__ == "__main__":
    main()
