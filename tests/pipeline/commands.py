"""Commands of lead-ds in processes of their own that need not import everything anew: forked from one that has.

What runs in them is `lead_ds.cli.main.main`, with the arguments that a shell would give it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PRELOADED = [
    *["lead_ds.engine.training.distill", "lead_ds.engine.training.warmup", "lead_ds.teachers.teach", "lead_ds.report"],
    *["lead_ds.retrieval.mine", "lead_ds.retrieval.search", "lead_ds.cli.main"],
    *["bm25s", "faiss", "ir_measures", "transformers.models.bert.modeling_bert"],
]


def run_command(arguments: list[str], log: str) -> None:
    """`lead-ds ARGUMENTS`, all it says appended to `log`; ends the process with the command's status."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from lead_ds.cli.main import main

    sys.argv = ["lead-ds", *arguments]
    main(arguments)


class Forked:
    """Runs a pipeline's commands; kills the first one for which `harm` says that it is time, as SIGKILL does."""

    def __init__(self, harm: Callable[[Sequence[str]], bool] | None = None) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.harm, self.ran = harm, [""]

    def __call__(self, command: Sequence[str], log: Path, keep: int) -> int:
        assert command[0] == "lead-ds"
        self.ran.append(log.parent.name.rsplit("-", 1)[0])
        process = self.context.Process(target=run_command, args=(list(command[1:]), str(log)))
        process.start()
        while process.exitcode is None and self.harm is not None:
            if self.harm(command):
                process.kill()
                self.harm = None
            time.sleep(0.002)
        process.join()
        assert process.exitcode is not None
        return process.exitcode
