"""Kill jobs N times at random moments, continue each, and hold what comes out against what comes out where nothing happens.

    python -m tests.stress 500 --log benchmarks/results/stress.jsonl

The jobs: a distillation on two ranks, encode, teach, index, mine, evaluate, prepare, a whole pipeline, most also on a disk
that is full after random bytes. With root, ssh, pdsh and /dev/net/tun also a distillation on two hosts, whose network drops,
doubles or delays, or parts them. The moment is any, or within a phase: a step, an evaluation, a checkpoint, its cleaning, a
file's last write. One process is killed, or several at once as by a power cut. After each, all are gone within minutes, what
lies under a final name is whole, and nothing that was complete is lost. Processes are forked from this one, which has imported
everything. Continues its log; a finding is a line with what went wrong, status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import pytest

import tests.helpers.imported  # noqa: F401
from tests.helpers.hosts import HOSTS, needs, two_hosts
from tests.stress.attempt import Attempt
from tests.stress.disk import FullDisk, can_mount
from tests.stress.harm import Harmed
from tests.stress.log import Log
from tests.stress.network import BadNetwork
from tests.stress.works import WORKS, prepare_rooms


def processor_seconds() -> float:
    """Of this process and those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def stress(kills: int, seed: int, folder: Path, log: Log, names: list[str], say: bool) -> None:
    """Go on with the log until it has so many kills, and every run that was killed has ended."""
    rooms = prepare_rooms(folder)
    harmed: dict[str, Harmed] = {}
    runs = max((run["run"] for run in log.runs), default=-1) + 1
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopping.append(n))

    def make(name: str) -> Harmed:
        how, _, work = name.rpartition(": ")
        if how == "bad network":
            hosts = stack.enter_context(two_hosts(folder / "hosts", "pdsh", wired=True))
            return BadNetwork(WORKS[work], rooms, folder, hosts)
        return (FullDisk if how else Harmed)(WORKS[work], rooms, folder)

    def go_on(name: str, dice: random.Random | None) -> None:
        nonlocal runs
        one, before = harmed.get(name) or harmed.setdefault(name, make(name)), processor_seconds()
        if one.run is None:
            one.begin(runs)
            runs += 1
        kill = one.attempt(dice)
        one.seconds += processor_seconds() - before
        if kill is not None:
            log.add(**kill)
        if one.ended is not None:
            log.add(**one.ended)
            one.run = None
        if say and (told := kill or one.ended):
            print(f"{len(log.kills)} {told}", flush=True)

    shares = {name: work.share for name, work in WORKS.items()}
    if can_mount(folder):
        shares |= {f"full disk: {name}": 1 + work.share // 4 for name, work in WORKS.items() if work.full}
    else:
        print("no file system can be mounted here: no disk is full", flush=True)
    try:
        needs(*HOSTS, "pdsh", wired=True)
        shares["bad network: distill"] = 10
    except pytest.skip.Exception as why:
        print(f"no network is bad: {why}", flush=True)
    with contextlib.ExitStack() as stack:
        while len(log.kills) < kills and not stopping:
            dice = random.Random(f"{seed} {len(log.rows)}")
            chosen = [name for name in names if name in shares] or list(shares)
            go_on(dice.choices(chosen, [shares[name] for name in chosen])[0], dice)
        for name, one in harmed.items():
            while one.run is not None:
                go_on(name, None)


def main() -> None:
    """Parse arguments, run, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--log", type=Path, help="JSON lines to add to; goes on where it ends")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help=f"of {', '.join(WORKS)}, or 'full disk: ...' of these, or 'bad network: distill'",
    )
    parser.add_argument("--quiet", action="store_true", help="only the counts at the end")
    arguments = parser.parse_args()
    log = Log(arguments.log)
    with tempfile.TemporaryDirectory(prefix="lead-ds-stress-") as folder:
        try:
            stress(arguments.kills, arguments.seed, Path(folder), log, arguments.only, not arguments.quiet)
        finally:
            if Attempt.last is not None and not Attempt.last.poll():
                Attempt.last.kill([*range(len(Attempt.last.pids)), -1])
                Attempt.last.wait(60)
    found = log.summary()
    print(found)
    sys.exit(any(found[name] for name in ("differing", "lost", "partial", "orphans", "left", "failed")))


if __name__ == "__main__":
    main()
