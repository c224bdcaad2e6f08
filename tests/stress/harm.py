"""A job that is killed, or whose disk is full, again and again until it ends well; then it is compared."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.stress.attempt import Attempt
from tests.stress.phases import START
from tests.stress.works import Files, Work

ENOUGH = "size=200m"
GONE = 1200.0  # seconds after a kill in which every process must have ended, on a machine that does much else


def can_mount(folder: Path) -> bool:
    """Whether a file system of a chosen size can be had here."""
    place = folder / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ENOUGH, "tmpfs", str(place)], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    return done.returncode == 0


class Harmed:
    """One job in one folder after the other; disk: on a file system that is full after random bytes, instead of kills."""

    def __init__(self, work: Work, rooms: Path, folder: Path, disk: bool) -> None:
        self.work, self.rooms, self.disk = work, rooms, disk
        self.name = f"full disk: {work.name}" if disk else work.name
        self.folder = folder / self.name.replace(": ", "-").replace(" ", "-")
        self.folder.mkdir()
        self.run: int | None = None
        self.ended: dict[str, Any] | None = None
        self.seconds = 0.0
        reference = self.folder / "reference"
        attempt = self._started(reference)
        attempt.wait(GONE)
        assert {*attempt.statuses.values()} == {0}, attempt.told()
        self.duration = time.monotonic() - attempt.began
        self.counts = {name: attempt.phases[0].entries(name) for name in work.spots}
        self.lengths = {name: attempt.phases[0].seconds(name) for name in work.spots}
        self.product, self.files = work.product(reference), work.complete(reference)
        self.bytes = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())

    def _started(self, out: Path) -> Attempt:
        log = self.folder / f"{out.parent.name if self.disk else out.name}.log"  # not on the disk that is full
        return Attempt(self.work.begin(self.rooms, out), self.work.spots, log)

    def begin(self, run: int) -> None:
        """Begin a run in a new folder."""
        self.run, self.kills, self.seconds, self.ended = run, 0, 0.0, None
        self.out = self.folder / f"run{run}" / "out" if self.disk else self.folder / f"run{run}"
        if self.disk:
            self.out.parent.mkdir()
            self._mount(ENOUGH, again=False)

    def _mount(self, limit: str, again: bool = True) -> None:
        how = ["-o", f"remount,{limit}"] if again else ["-t", "tmpfs", "-o", limit, "tmpfs"]
        subprocess.run(["mount", *how, str(self.out.parent)], check=True, capture_output=True)

    def attempt(self, dice: random.Random | None) -> dict[str, Any] | None:
        """Go on with the run, and harm it unless `dice` is None; what was done to it, if it came to that."""
        before = self.work.complete(self.out) if self.out.exists() else {}
        if self.work.done(self.out):
            self._compare(None)
            return None
        if self.disk:
            return self._fill(dice, before)
        attempt = self._started(self.out)
        aim, victims = self._aim(attempt, dice) if dice is not None else ("", [])
        if not victims:
            attempt.wait(GONE)
            self._compare(attempt)
            return None
        if attempt.poll():
            self._compare(attempt)
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
        lost, partial = self._damage(before)
        self.kills += 1
        return {
            "run": self.run,
            "work": self.name,
            "victims": named(victims, len(attempt.pids)),
            "aim": aim,
            "phase": next((name for name in phases if name != START), START),
            "after": round(moment, 3),
            "lost": lost,
            "partial": partial,
            "orphans": orphans,
        }

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

    def _fill(self, dice: random.Random | None, before: Files) -> dict[str, Any] | None:
        if dice is None:
            attempt = self._started(self.out)
            attempt.wait(GONE)
            self._compare(attempt)
            return None
        used = sum(path.stat().st_blocks * 512 for path in self.out.parent.rglob("*") if path.is_file())
        room = dice.randrange(4096, max(8192, int(self.bytes * 1.1)))
        self._mount(f"size={used + room}")
        attempt = self._started(self.out)
        attempt.wait(GONE)
        orphans = attempt.alive()
        attempt.kill(range(len(attempt.pids)))
        attempt.wait(10)
        self._mount(ENOUGH)
        if not any(attempt.statuses.values()):
            self._compare(attempt)
            return None
        told = attempt.told()
        lost, partial = self._damage(before)
        said = [line for line in told.splitlines() if line.startswith("error: ")]
        if "Traceback" in told or not said:
            partial = [*partial, f"not a line of ours: {told[-600:]}"]
        self.kills += 1
        attempt.log.unlink()
        return {
            "run": self.run,
            "work": self.name,
            "victims": "a full disk",
            "aim": f"{room} bytes",
            "phase": "writing",
            "said": (said[-1][:200] if said else "").replace(str(self.folder), ""),
            "after": round(time.monotonic() - attempt.began, 3),
            "lost": lost,
            "partial": partial,
            "orphans": orphans,
        }

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

    def _compare(self, attempt: Attempt | None) -> None:
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
        if self.disk:
            subprocess.run(["umount", "-l", str(self.out.parent)], check=True)
        if equal:
            shutil.rmtree(self.out.parent if self.disk else self.out, ignore_errors=True)


def named(victims: Sequence[int], ranks: int) -> str:
    """Whom a kill hit."""
    if len(victims) > 1:
        return "all at once"
    return "a pipeline's stage" if victims[0] < 0 else f"rank {victims[0]}" if ranks > 1 else "the process"
