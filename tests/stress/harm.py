"""A job that is harmed, by kills or by what its subclasses do, again and again until it ends well; then it is compared."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.stress.attempt import Attempt
from tests.stress.phases import START
from tests.stress.works import Files, Work

GONE = 1200.0  # seconds after a harm in which every process must have ended, on a machine that does much else


class Harmed:
    """One job in one folder after the other; its processes are killed."""

    how = ""  # before the job's name in the log

    def __init__(self, work: Work, rooms: Path, folder: Path) -> None:
        self.work, self.rooms = work, rooms
        self.name = self.how + work.name
        self.folder = folder / self.name.replace(": ", "-").replace(" ", "-")
        self.folder.mkdir()
        self.run: int | None = None
        self.ended: dict[str, Any] | None = None
        self.seconds = 0.0
        reference = self.folder / "reference"
        attempt = self.started(reference)
        attempt.wait(GONE)
        assert {*attempt.statuses.values()} == {0}, attempt.told()
        self.duration = time.monotonic() - attempt.began
        self.counts = {name: attempt.phases[0].entries(name) for name in work.spots if attempt.phases}
        self.lengths = {name: attempt.phases[0].seconds(name) for name in work.spots if attempt.phases}
        self.product, self.files = work.product(reference), work.complete(reference)
        self.bytes = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())

    def started(self, out: Path) -> Attempt:
        """The job's processes, begun or continued."""
        return Attempt(self.work.begin(self.rooms, out), self.work.spots, self.folder / f"{out.name}.log")

    def begin(self, run: int) -> None:
        """Begin a run in a new folder."""
        self.run, self.kills, self.seconds, self.ended = run, 0, 0.0, None
        self.out = self.folder / f"run{run}"

    def attempt(self, dice: random.Random | None) -> dict[str, Any] | None:
        """Go on with the run, and harm it unless `dice` is None; what was done to it, if it came to that."""
        before = self.work.complete(self.out) if self.out.exists() else {}
        if self.work.done(self.out):
            self.compare(None)
            return None
        if dice is not None:
            return self.harm(dice, before)
        attempt = self.started(self.out)
        attempt.wait(GONE)
        self.compare(attempt)
        return None

    def harm(self, dice: random.Random, before: Files) -> dict[str, Any] | None:
        """Start it, and kill some of its processes at a random moment; None where it ended before."""
        attempt = self.started(self.out)
        aim, victims = self._aim(attempt, dice)
        if attempt.poll():
            self.compare(attempt)
            return None
        phases = [phases.now for phases in attempt.phases]
        moment = time.monotonic() - attempt.began
        attempt.kill(victims)
        if not attempt.wait(2):
            attempt.kill([0, 1] if len(attempt.pids) > 1 else [], signal.SIGTERM)  # as a launcher does that notices
        deadline = time.monotonic() + GONE
        while (orphans := attempt.alive() if attempt.poll() else ["it"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        attempt.kill([*range(len(attempt.pids)), -1])
        attempt.wait(10)
        phase = next((name for name in phases if name != START), START)
        return self.row(before, named(victims, len(attempt.pids)), aim, phase, moment, orphans)

    def row(
        self, before: Files, victims: str, aim: str, phase: str, after: float, orphans: Sequence[str], **more: Any
    ) -> dict[str, Any]:
        """A line of the log: what was done, and what came of it. more: e.g. `partial`, what else is wrong."""
        lost, partial = self._damage(before)
        self.kills += 1
        facts = {"run": self.run, "work": self.name, "victims": victims, "aim": aim, "phase": phase}
        facts |= {"after": round(after, 3), "lost": lost, "partial": [*partial, *more.pop("partial", [])]}
        return {**facts, "orphans": list(orphans), **more}

    def _aim(self, attempt: Attempt, dice: random.Random) -> tuple[str, Sequence[int]]:
        """Wait for a random moment: any, or one within a phase; what was aimed at, and whom to kill."""
        phases = [name for name in self.work.spots if self.counts[name]]
        aim = dice.choice(["any moment", *phases])
        victims = dice.choice(self.work.victims)
        if aim == "any moment":
            attempt.wait(dice.uniform(0, self.duration * 1.1))
            return aim, victims
        watched = attempt.phases[0]
        entry = dice.randint(1, max(1, self.counts[aim] // 2 if self.kills else self.counts[aim]))
        attempt.until(lambda: watched.entries(aim) >= entry)
        attempt.wait(dice.uniform(0, self.lengths[aim]), nap=0.0005)
        return aim, victims

    def _damage(self, before: Files) -> tuple[list[str], list[str]]:
        """What was complete and is no longer; what lies under a final name and is not what belongs there."""
        try:
            after = self.work.complete(self.out) if self.out.exists() else {}
        except Exception as error:
            return [], [f"{type(error).__name__}: {error}"[:300]]
        keep = self.work.keep
        steps = sorted(name for name in after if name.startswith("step-"))
        # The best may stay behind, so that the oldest of all is no measure.
        pruned = {name for name in before if keep and len(steps) >= keep and name < steps[-keep]}
        lost = sorted(set(before) - set(after) - pruned)
        partial = [name for name, found in after.items() if found and found != self.files.get(name)]
        return lost, partial

    def compare(self, attempt: Attempt | None) -> None:
        """The end of a run: that it ended well, with the same product, and left nothing half done behind."""
        failed, equal = "", False
        if (attempt is not None and any(attempt.statuses.values())) or (attempt is not None and not attempt.statuses):
            failed = f"{attempt.statuses}: {attempt.told()[-1500:]}"
        else:
            try:
                equal = self.work.product(self.out) == self.product
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"[:300]
        left = [str(path.relative_to(self.out)) for path in self.out.rglob("*") if path.suffix in (".tmp", ".partial")]
        self.ended = {"run": self.run, "work": self.name, "kills": self.kills, "equal": equal, "left": left}
        self.ended |= {"seconds": round(self.seconds, 1)} | ({"failed": failed} if failed else {})
        self.end()
        if equal:
            shutil.rmtree(self.out, ignore_errors=True)

    def end(self) -> None:
        """Undo what `begin` did."""


def named(victims: Sequence[int], ranks: int) -> str:
    """Whom a kill hit."""
    if len(victims) > 1:
        return "all at once"
    return "a pipeline's stage" if victims[0] < 0 else f"rank {victims[0]}" if ranks > 1 else "the process"
