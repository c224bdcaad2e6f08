"""Ranks that stand still as NCCL's do: collectives return at once, and the host waits outside of them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.distributed.signals import Signals
from lead_ds.engine.distributed.watchdog import Watchdog, verdict


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
