"""A distillation by lead-ds under the clock of `benchmarks.peers`, in a process of its own.

    python -m benchmarks.peers_ours CONFIG

What `lead-ds distill CONFIG` does, with a callback. The last line printed is what was measured, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers_theirs import Clock, status
from lead_ds.config import load_config
from lead_ds.engine.records.callbacks import Callback, RunFacts
from lead_ds.face.distiller import Distiller


class Steps(Callback):
    """Tells the clock of every step."""

    def __init__(self, clock: Clock, last: int) -> None:
        self.clock, self.last = clock, last
        self.measured: dict[str, Any] = {}

    def on_start(self, run: RunFacts) -> None:
        """See `Callback`."""
        self.clock.before = status("VmRSS")

    def on_step(self, metrics: dict[str, Any]) -> None:
        """See `Callback`."""
        self.clock.step()
        self.clock.losses.append(metrics["loss"])
        if metrics["step"] == self.last:  # before the checkpoint and the report, which others do not write
            self.measured = self.clock.found(float(os.environ["PEERS_STARTED"]))


def main() -> None:
    """Run it."""
    config = load_config(Path(sys.argv[1]))
    steps = Steps(Clock(), config.train.steps)
    Distiller.of(config, callbacks=[steps]).train(quiet=True)
    print(json.dumps(steps.measured))


if __name__ == "__main__":
    main()
