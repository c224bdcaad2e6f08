"""The processes of a run: who this one is, and the few collective operations the rest of the engine needs."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions hold, as defaults, the one that they are born in
from torch import Tensor

from lead_ds.engine.distributed.engines import engines_let_go
from lead_ds.engine.distributed.launchers import ends_with_launchers
from lead_ds.errors import InputError, RunError
from lead_ds.io.waiting import AGAIN, WAIT

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among all, and its device."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over all ranks, without gradient."""
        if self.world == 1:
            return x.detach()
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.world

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()

    def from_main(self, value: T) -> T:
        """Rank 0's `value`, on every rank. A small picklable object of our own making."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def all(self, value: T) -> list[T]:
        """Every rank's `value`, in order of rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values


def launched_rank() -> int:
    """This process's rank as its launcher set it, before anything is initialised; 0 when started by hand."""
    return int(os.environ.get("RANK", "0"))


def local_world(world: int) -> int:
    """Processes on this machine, as the launcher set it; all of them where it did not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)


@contextmanager
def ranks(timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the processes that the launcher started (or be the only one), and leave them again at the end.

    Inside another such context, or where the caller has joined them, this is that group, left to its owner.

    Works under the DeepSpeed launcher, torchrun and SLURM's or MPI's environments that set RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT; without these, one process of its own.
    """
    if torch.get_default_device().type != "cpu":
        what = "is set: what is made here for the host would be made there"
        raise InputError("torch.set_default_device", what, "call this without it: models find their devices themselves")
    if dist.is_initialized():
        with engines_let_go():
            yield _this_rank()
        return
    _collect_left()
    alone, hook = dict[str, str](), sys.excepthook
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(free_port())
        os.environ.update(alone)
    _check_place()
    prepare_environment()
    import deepspeed

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        _skip_shared_memory_op()
    with _told_while_waiting(), _rendezvous_errors():
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=timedelta(minutes=timeout_minutes)
        )
    try:
        with ends_with_launchers(), engines_let_go():
            yield _this_rank()
    finally:
        # gloo aborts at exit otherwise. After a failure the others may be gone: destroying waits for nobody.
        if dist.is_initialized():
            _left.extend(map(weakref.ref, dist.distributed_c10d._world.pg_map))
            dist.destroy_process_group()
        # DeepSpeed would take the groups that have gone for the next ones.
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        for name in alone:  # what this process starts later is not one of our ranks
            os.environ.pop(name, None)
        if alone:
            _unwrap_excepthook(hook)


def _unwrap_excepthook(before: Any) -> None:
    """Take PyTorch's off: it comes anew each time, and would tell a script's own errors as rank 0's. Another's stays."""
    if str(getattr(sys.excepthook, "__module__", "")).startswith("torch.distributed"):
        sys.excepthook = before


_left: list[weakref.ref[Any]] = []  # groups that are no more, though something may still hold them


def _collect_left() -> None:
    """Have left groups go that only garbage holds, such as the traceback of a run that failed.

    Before a fork, too: the child lacks their threads, and its own collector would wait for these for ever.
    """
    if any(group() is not None for group in _left):
        gc.collect()
    _left[:] = [group for group in _left if group() is not None]


os.register_at_fork(before=_collect_left)


def _check_place() -> None:
    """Raise RunError where a launcher has not said all of this process's place, or one that there is not."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            what = "RANK is set in the environment, and this is not"
            raise RunError(name, what, "set it as well, use a launcher, or unset RANK for one process alone")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise RunError(
                name, f"is {os.environ[name]!r} in the environment, and no number", "use a launcher, or unset it"
            )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world:
        raise RunError("RANK", f"is {rank} of WORLD_SIZE {world}", f"number the processes from 0 to {world - 1}")


def _meeting_point() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


@contextmanager
def _told_while_waiting() -> Iterator[None]:
    """Say on stderr what is waited for, when the processes have not met after WAIT seconds, and each minute from then on."""
    met, point = threading.Event(), _Point()

    def announce() -> None:
        while not met.wait(point.announced()):
            pass

    def tell() -> None:
        began, due = time.monotonic(), WAIT
        while not met.wait(1.0):
            waited = time.monotonic() - began
            if waited < due:
                continue
            due = waited + AGAIN
            rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
            what = (
                f"rank {rank} on {socket.gethostname()} has waited {waited:.0f} s for all of {world} processes to meet"
            )
            advice = "is each of them started, and can each reach that address? (MASTER_ADDR, MASTER_PORT, WORLD_SIZE)"
            print(f"{what} at {_meeting_point()}; {point.absent()}: {advice}", file=sys.stderr, flush=True)

    for work in (announce, tell):  # apart: what answers there may let an announcement wait for ever
        threading.Thread(target=work, name="lead-ds-waiting", daemon=True).start()
    try:
        yield
    finally:
        met.set()


class _Point:
    """Where the processes meet, as this one finds it."""

    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.found = "nobody answers there, so rank 0 is missing"

    def announced(self) -> float:
        """Let the store there know of this process, if it is one; seconds after which to try again."""
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection((host, port), timeout=1).close()  # PyTorch would print where nobody answers
        except socket.gaierror:
            self.found = "no host has that name"
            return 5.0
        except (KeyError, ValueError, OSError):
            if os.environ.get("RANK") == "0":
                self.found = "this is rank 0, and cannot reach itself there: MASTER_ADDR is the address of another host"
            return 1.0
        self.found = "what answers there is not rank 0, or not yet: another program may have the port"
        try:
            timeout = timedelta(seconds=2)
            store = dist.PrefixStore(
                "lead-ds/present", dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            )
            store.set(os.environ["RANK"], socket.gethostname())
        except (dist.DistError, RuntimeError, KeyError, OSError):
            return 120.0  # PyTorch prints its stack each time
        self.store = store
        return 1e9

    def absent(self) -> str:
        """Who is missing, or what is wrong with the place."""
        if self.store is None:
            return self.found
        try:
            world = range(int(os.environ["WORLD_SIZE"]))
            absent = [str(rank) for rank in world if not self.store.check([str(rank)])]
        except (dist.DistError, RuntimeError, OSError):
            return "rank 0 does not answer any more"
        return f"missing: rank {', '.join(absent[:8])}" if absent else "all have come, and are connecting"


@contextmanager
def _rendezvous_errors() -> Iterator[None]:
    """Errors of the meeting of processes as RunError, which names what to do."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if "EADDRINUSE" in reason or "address already in use" in reason.lower():
            remedy = "another run may have it: choose another (deepspeed --master_port N), or end that run"
            raise RunError(f"MASTER_PORT {os.environ.get('MASTER_PORT')}", "is in use on this host", remedy) from error
        remedy = "see that every process is started and reaches MASTER_ADDR and MASTER_PORT; lead-ds doctor --hostfile checks it"
        raise RunError(_meeting_point(), f"the processes did not meet: {reason[:300]}", remedy) from error


@contextmanager
def closed_to_others() -> Iterator[None]:
    """Files that others cannot write to, whatever the umask is; who may read them is the user's choice."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def _this_rank() -> Ranks:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


def prepare_environment() -> None:
    """Quieten DeepSpeed and transformers, and let DeepSpeed's op builder find the ninja of this environment."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed still calls collectives by the names that newer torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    scripts = str(Path(sys.executable).parent)
    if shutil.which("ninja") is None and scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + scripts
    from deepspeed.utils import logger

    logger.setLevel(os.environ["DEEPSPEED_LOG_LEVEL"].upper())
    # Our scorers hold no parameters of their own, so that ZeRO-3 loses nothing by not seeing into their outputs.
    logger.addFilter(_not_of_our_scorers)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _not_of_our_scorers(record: logging.LogRecord) -> bool:
    return "unknown inputs or outputs type (<class 'lead_ds." not in record.getMessage()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _skip_shared_memory_op() -> None:
    # On CPU, DeepSpeed compiles a shared-memory all-reduce at start (half a minute, and a C++ compiler). Only its tensor
    # parallelism uses it: ours never does.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
