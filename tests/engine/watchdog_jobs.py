"""Ranks that stand still as NCCL's do: collectives return at once, and the host waits outside of them."""

from __future__ import annotations

import io
import os
import time
from contextlib import redirect_stderr
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist

from lead_ds.engine.distributed import watchdog as watchdogs
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.distributed.signals import Signals
from lead_ds.engine.distributed.watchdog import Watchdog, verdict, waiting_ranks
from tests.helpers.forked import become


def late(folder: str, blamed: int) -> str | None:
    """At one place of the loop all ranks issue a collective, and the blamed one does not issue the next: what rank 0 says."""
    with ranks() as here, Watchdog(here, 5.0, Path(folder), Signals()) as watchdog:
        watchdog.interval = 0.2
        watchdog.at("step 3, student forward")
        x = torch.ones(4)
        dist.all_reduce(x, async_op=True).wait()
        begun = None if here.rank == blamed else dist.all_reduce(x, async_op=True)
        found = None
        if here.rank == 0:
            deadline = time.monotonic() + 600
            while "hangs in" not in (found or "") and time.monotonic() < deadline:  # until both have posted, twice
                before = watchdog._everyone()
                time.sleep(2)
                found = verdict(before, watchdog._everyone(), here.rank)
            watchdog._store.set("done", "yes")
        while not watchdog._store.check(["done"]):  # as a host that waits for its stream: in no collective's frame
            time.sleep(0.05)
        watchdog._store.set(f"seen {here.rank}", "yes")
        watchdog._store.wait([f"seen {rank}" for rank in range(here.world)])  # rank 0 holds the store of all
        (begun or dist.all_reduce(x, async_op=True)).wait()
        return found


def waiting() -> str:
    """Rank 1 does not come to a barrier until rank 0 has said that it waits for it: what rank 0 says."""
    watchdogs.WAIT = watchdogs.AGAIN = 0.5
    told = io.StringIO()
    with redirect_stderr(told), waiting_ranks() as here:
        store = dist.distributed_c10d._get_default_store().clone()
        if here.rank == 1:
            store.wait(["said"])

        def watch() -> None:
            while "its work: see" not in told.getvalue():  # until both have posted
                time.sleep(0.05)
            store.set("said", "yes")

        if here.rank == 0:
            Thread(target=watch, daemon=True).start()
        here.barrier()
    return told.getvalue()


def alone(told: str) -> None:
    """A rank alone stands still, where no file can be written: it ends this process."""
    become(dict(os.environ), told, told)
    with Watchdog(Ranks(0, 0, 1, torch.device("cpu")), 0.01, Path("/proc/nope"), Signals()):
        time.sleep(600)
