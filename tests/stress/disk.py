"""A job whose disk is full after random bytes."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.stress.attempt import Attempt
from tests.stress.harm import GONE, Harmed
from tests.stress.works import Files

ENOUGH = "size=200m"


def can_mount(folder: Path) -> bool:
    """Whether a file system of a chosen size can be had here."""
    place = folder / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ENOUGH, "tmpfs", str(place)], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    return done.returncode == 0


class FullDisk(Harmed):
    """In a file system of its own, which is made too small before each attempt."""

    how = "full disk: "

    def started(self, out: Path) -> Attempt:
        """Its log is not on the disk that is full."""
        name = out.parent.name if out.name == "out" else out.name
        return Attempt(self.work.begin(self.rooms, out), self.work.spots, self.folder / f"{name}.log")

    def begin(self, run: int) -> None:
        """Mount it."""
        super().begin(run)
        self.out = self.folder / f"run{run}" / "out"
        self.out.parent.mkdir()
        self._mount(ENOUGH, again=False)

    def end(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "-l", str(self.out.parent)], check=True)

    def _mount(self, limit: str, again: bool = True) -> None:
        how = ["-o", f"remount,{limit}"] if again else ["-t", "tmpfs", "-o", limit, "tmpfs"]
        subprocess.run(["mount", *how, str(self.out.parent)], check=True, capture_output=True)

    def harm(self, dice: random.Random, before: Files) -> dict[str, Any] | None:
        """Leave it a random number of bytes; None where these were enough."""
        used = sum(path.stat().st_blocks * 512 for path in self.out.parent.rglob("*") if path.is_file())
        room = dice.randrange(4096, max(8192, int(self.bytes * 1.1)))
        self._mount(f"size={used + room}")
        attempt = self.started(self.out)
        attempt.wait(GONE)
        orphans = attempt.alive()
        attempt.kill(range(len(attempt.pids)))
        attempt.wait(10)
        self._mount(ENOUGH)
        if not any(attempt.statuses.values()):
            self.compare(attempt)
            return None
        told = attempt.told()
        said = [line for line in told.splitlines() if line.startswith("error: ")]
        raw = [f"not a line of ours: {told[-600:]}"] if "Traceback" in told or not said else []
        attempt.log.unlink()
        line = (said[-1][:200] if said else "").replace(str(self.folder), "")
        after = time.monotonic() - attempt.began
        return self.row(before, "a full disk", f"{room} bytes", "writing", after, orphans, said=line, partial=raw)
