"""A pipeline's commands, in processes that need not import everything anew."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.forked import forked, run_command


class Forked:
    """Runs a pipeline's commands; kills the first one for which `harm` says that it is time, as SIGKILL does."""

    def __init__(self, harm: Callable[[Sequence[str]], bool] | None = None) -> None:
        self.harm, self.ran = harm, [""]

    def __call__(self, command: Sequence[str], log: Path, keep: int) -> int:
        assert command[0] == "lead-ds"
        self.ran.append(log.parent.name.rsplit("-", 1)[0])
        process = forked(run_command, list(command[1:]), dict(os.environ), str(log), str(log))
        while process.exitcode is None and self.harm is not None:
            if self.harm(command):
                process.kill()
                self.harm = None
            time.sleep(0.002)
        process.join()
        assert process.exitcode is not None
        return process.exitcode
