"""Latency and bandwidth of a real all-reduce between hosts, one process on each, started over ssh.

Bandwidth is the bus bandwidth of NCCL's tests: bytes / time x 2 (W - 1) / W.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from lead_ds.doctor.hosts import Host, remote_python, ssh_command

SECONDS = 60


def measure(hosts: Sequence[Host], address: str, port: int, backend: str, ssh_port: int | None) -> dict[str, Any]:
    """Run the collective over all `hosts`; {"latency": s, "bandwidth": bytes/s} or {"error": what}."""
    processes = []
    for rank, host in enumerate(hosts):
        arguments = [str(rank), str(len(hosts)), address, str(port), backend]
        command = ssh_command(host.name, remote_python("lead_ds.doctor.link", arguments), ssh_port)
        processes.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        )
    deadline = time.monotonic() + SECONDS + 30
    outputs, failed = [], ""
    for host, process in zip(hosts, processes, strict=True):
        try:
            out, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            errors += "\nno answer in time"
        outputs.append(out)
        if process.returncode and not failed:
            failed = f"{host.name}: {(errors.strip().splitlines() or ['failed'])[-1][:300]}"
    if failed:
        return {"error": failed}
    try:
        return json.loads(outputs[0].strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"{hosts[0].name}: no measurement came back"}


def collective(rank: int, world: int, address: str, port: int, backend: str) -> dict[str, float]:
    """Time all-reduces as one rank of `world`: of 4 bytes (latency) and of 32 MB (256 MB on GPUs; bandwidth)."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )

    def timed(elements: int, repeat: int) -> float:
        x = torch.ones(elements, device=device)
        times = []
        for _ in range(repeat):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(x)
            x[0].item()  # waits for the device
            times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]

    elements = (1 << 26) if backend == "nccl" else (1 << 23)
    timed(1, 3)
    latency, seconds = timed(1, 20), timed(elements, 5)
    dist.destroy_process_group()
    return {"latency": latency, "bandwidth": elements * 4 / seconds * 2 * (world - 1) / world}


if __name__ == "__main__":
    rank, world, address, port, backend = sys.argv[1:]
    found = collective(int(rank), int(world), address, int(port), backend)
    if rank == "0":
        print("\n" + json.dumps(found), flush=True)
