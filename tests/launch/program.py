"""Stands where `python -m lead_ds` would be, beside a copy of launch/: one that fails, dies or tells where it is on demand."""

import json
import os
import signal
import sys
import time
from pathlib import Path

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
act, *rest = sys.argv[1:]
if act == "tell":  # where am I, what was I given
    out = Path(rest[0])
    told = {
        name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "DS_ACCELERATOR")
    }
    told |= {"arguments": rest[1:], "nccl": os.environ.get("NCCL_DEBUG"), "hf": os.environ.get("HF_HOME")}
    told |= {
        "token": os.environ.get("HF_TOKEN"),
        "own": os.environ.get("OWN_SETTING"),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "threads": os.environ["OMP_NUM_THREADS"],
    }
    (out / f"{rank}.json").write_text(json.dumps(told))
elif act == "sum":  # a real collective
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = torch.tensor([float(rank + 1)])
    dist.all_reduce(x)
    print(f"rank {rank} sum {x.item():.0f}", flush=True)
    dist.destroy_process_group()
elif act == "fail":  # one rank fails, the others wait for ever, or fail of it
    chosen, status, others = int(rest[0]), int(rest[1]), rest[2]
    if rank == chosen:
        time.sleep(1.5)
        print(f"error: rank {rank} says why", file=sys.stderr, flush=True)
        if status == -9:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(status)
    if others == "follow":
        time.sleep(1.5)
        print("RuntimeError: [gloo] Connection closed by peer", file=sys.stderr, flush=True)
        sys.exit(1)
    (Path(rest[3]) / f"{rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)
elif act == "once":  # fails on its first attempt only
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        sys.exit(int(rest[0]))
    print(f"rank {rank} second attempt", flush=True)
elif act == "hang up":  # the terminal of the one that started this is closed
    os.kill(os.getppid(), signal.SIGHUP)
    time.sleep(1)
elif act == "wrong":
    with (Path(rest[0]) / f"{rank}.attempts").open("a") as file:
        file.write("x")
    print("error: run.yaml: train.lr: is wrong", file=sys.stderr, flush=True)
    sys.exit(2)
