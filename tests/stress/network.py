"""A distillation on two hosts whose network drops, doubles and delays frames for a while, or parts the hosts."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.running import steps_of
from tests.helpers.hosts import Hosts
from tests.helpers.wire import CALM, CUT, Weather
from tests.stress.attempt import Attempt
from tests.stress.harm import GONE, Harmed
from tests.stress.phases import Phases
from tests.stress.works import Files, Work, training_config

# What the network does, for how many seconds at most. A host that is lost is noticed after 25.
WEATHERS: dict[str, tuple[Callable[[random.Random], Weather], float]] = {
    "drops": (lambda dice: Weather(drop=dice.uniform(0.01, 0.3)), 20.0),
    "doubles": (lambda dice: Weather(twice=dice.uniform(0.1, 0.9), varies=0.01), 20.0),
    "delays": (lambda dice: Weather(late=dice.uniform(0.005, 0.05), varies=dice.uniform(0, 0.05)), 20.0),
    "parts": (lambda dice: CUT, 60.0),
}


class Remote(Attempt):
    """One attempt at `distill` on two hosts, by DeepSpeed's launcher over ssh."""

    def __init__(self, hosts: Hosts, config: Path, out: Path) -> None:
        self.hosts, self.out, self.log = hosts, out, config.with_suffix(".log")
        more = ["--resume"] if (out / "config.yaml").exists() else []
        self.began = time.monotonic()
        self.process: subprocess.Popen = hosts.distill(config, *more)
        self.pids, self.statuses, self.phases = [self.process.pid], {}, list[Phases]()
        Attempt.last = self

    def poll(self) -> bool:
        """Whether the launcher has ended."""
        if (status := self.process.poll()) is not None:
            self.statuses[0] = status
        return status is not None

    def alive(self) -> list[str]:
        """What works on the run, on either host."""
        return [" ".join(p.cmdline())[:200] for host in (0, 1) for p in self.hosts.processes(host, str(self.out))]


class BadNetwork(Harmed):
    """hosts: with a cable that can be made worse."""

    how = "bad network: "

    def __init__(self, work: Work, rooms: Path, folder: Path, hosts: Hosts) -> None:
        self.hosts = hosts
        super().__init__(work, rooms, folder)

    def started(self, out: Path) -> Remote:
        """On the two hosts."""
        return Remote(self.hosts, training_config(self.rooms, out), out)

    def harm(self, dice: random.Random, before: Files) -> dict[str, Any] | None:
        """From a random moment on, for a while, let the network be bad; None where it ended before."""
        name = dice.choice(list(WEATHERS))
        make, longest = WEATHERS[name]
        weather, seconds = make(dice), dice.uniform(0.5, longest)
        step = dice.choice([0, dice.randrange(12)])
        wire, attempt = self.hosts.wire, self.started(self.out)
        assert wire is not None
        if step:
            attempt.until(lambda: steps_of(self.out) >= step)
        else:
            attempt.wait(dice.uniform(0, self.duration))
        if attempt.poll():
            self.compare(attempt)
            return None
        moment, carried = time.monotonic() - attempt.began, wire.frames
        phase = "training" if steps_of(self.out) else "starting"
        wire.weather(weather)
        attempt.wait(seconds)
        lasted = time.monotonic() - attempt.began - moment
        wire.weather(CALM)
        frames = [now - was for now, was in zip(wire.frames, carried, strict=True)]
        ended = attempt.wait(GONE)
        deadline = time.monotonic() + GONE
        while (orphans := attempt.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        attempt.kill([0])
        told = attempt.told()
        said = re.findall(r"^(?:lead-.: )?(?:error: |launch: {3}|launch: 255 ).*", told, re.M)
        raw = [] if attempt.statuses.get(0) == 0 or (ended and said) else [f"not a line of ours: {told[-600:]}"]
        facts = {"frames": frames, "lasted": round(lasted, 3), "status": attempt.statuses.get(0)}
        facts["said"] = said[-1][:200].replace(str(self.folder), "") if said else ""
        aim = f"{name}: {', '.join(f'{k} {v:.3f}' for k, v in weather._asdict().items() if v)}"
        row = self.row(before, f"network {name}", aim, phase, moment, orphans, partial=raw, **facts)
        if attempt.statuses.get(0) == 0:
            self.compare(attempt)
        return row
