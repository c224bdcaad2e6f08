"""Facts -> findings. Pure functions: what a machine lacks, and what one host has differently from this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lead_ds.doctor.report import Line, Status

GB = 10**9
PYTHONS = ((3, 10), (3, 13))


def machine(facts: dict[str, Any], host: str) -> Iterator[Line]:
    """Findings about one machine on its own."""

    def line(name: str, status: Status, found: str, remedy: str = "") -> Line:
        return Line(host, name, status, found, "" if status == "green" else remedy)

    version = tuple(int(part) for part in facts["python"].split(".")[:2])
    known = PYTHONS[0] <= version <= PYTHONS[1]
    yield line("Python", "green" if known else "red", facts["python"], "use Python 3.10 to 3.13")
    if facts["missing"]:
        yield line(
            "packages", "red", "missing: " + ", ".join(facts["missing"]), "pip install -e . in lead-ds's checkout"
        )
    else:
        listed = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
        yield line("packages", "green", listed)
    yield line("cores, memory", "green", f"{facts['cores']} cores, {facts['memory'] / GB:.0f} GB")
    yield from _accelerator(facts, line)
    yield from _tools(facts, line)
    yield from _room(facts, line)


def _accelerator(facts: dict[str, Any], line: Any) -> Iterator[Line]:
    torch, gpus = facts["torch"], facts["gpus"]
    if "error" in torch:
        yield line("torch", "red", f"cannot be imported: {torch['error'][:200]}", "pip install torch")
    elif gpus and not torch["available"]:
        if torch["cuda"] is None:
            what, remedy = "torch is a CPU build", "pip install torch from https://pytorch.org/get-started (CUDA)"
        else:
            what = f"torch (CUDA {torch['cuda']}) does not see them under driver {facts['driver']}"
            remedy = "update the driver, or install a torch for an older CUDA"
        yield line("GPUs", "red", f"{len(gpus)} x {gpus[0]['name']}, but {what}", remedy)
    elif gpus:
        memory = min(gpu["memory"] for gpu in gpus) / GB
        cards = f"{len(gpus)} x {gpus[0]['name']}, {memory:.0f} GB; driver {facts['driver']}, torch for CUDA {torch['cuda']}"
        yield line("GPUs", "green", cards)
        yield line(
            "NCCL",
            "green" if torch["nccl"] else "red",
            "in torch" if torch["nccl"] else "not in torch",
            "reinstall torch",
        )
    else:
        yield line(
            "GPUs",
            "yellow",
            "none: runs on the CPU (gloo)",
            "for the demo and for tests only: use a machine with a GPU",
        )
    if "error" not in torch and not torch["gloo"]:
        yield line("gloo", "red", "not in torch", "install a torch with distributed support")


def _tools(facts: dict[str, Any], line: Any) -> Iterator[Line]:
    cuda = bool(facts["gpus"])
    yield line(
        "C++ compiler",
        "green" if facts["compiler"] else ("red" if cuda else "yellow"),
        facts["compiler"] or "none",
        "apt-get install g++ (Triton's kernels and DeepSpeed's operators are compiled when they are first used)",
    )
    yield line(
        "ninja",
        "green" if facts["ninja"] else "red",
        facts["ninja"] or "none",
        "pip install ninja (DeepSpeed compiles with it)",
    )
    if cuda:
        remedy = "install the CUDA toolkit and set CUDA_HOME, if a configuration uses DeepSpeed's own optimizers"
        yield line("CUDA compiler", "green" if facts["nvcc"] else "yellow", facts["nvcc"] or "no nvcc", remedy)
    operators = facts["operators"]
    if isinstance(operators, str):
        yield line(
            "DeepSpeed", "red", operators[:200], "DS_BUILD_OPS=0 pip install deepspeed, torch installed before it"
        )
    else:
        able = [name for name, can in operators.items() if can]
        unable = [name for name, can in operators.items() if not can]
        found = f"can be built: {', '.join(able) or 'none'}" + (f"; cannot: {', '.join(unable)}" if unable else "")
        remedy = "needed only where a configuration names them: async_io (offload: nvme) wants libaio-dev"
        yield line("DeepSpeed operators", "yellow" if unable else "green", found, remedy)
    for lock in facts["locks"]:
        since = f"{lock['path']}, {lock['age'] / 60:.0f} minutes old"
        what = "held by a process that is at work" if lock["held"] else "that no process of this machine has open"
        remedy = "whoever compiles there waits for ever: delete it, if no other host compiles there"
        yield line("compile lock", "green" if lock["held"] else "red", f"{since}, {what}", remedy)
    for name, module, remedy in (
        ("Triton", "triton", "pip install triton, or kernels: torch (chunked, slower)"),
        ("FAISS", "faiss", 'pip install "lead-ds[cpu]" or "lead-ds[gpu]", for index and search'),
    ):
        yield line(name, "green" if facts[module] else "yellow", facts[module] or "not installed", remedy)


def _room(facts: dict[str, Any], line: Any) -> Iterator[Line]:
    for name, disk in facts["disk"].items():
        free = disk["free"] / GB
        status: Status = "red" if free < 1 or not disk["writable"] else "yellow" if free < 20 else "green"
        found = f"{disk['path']}: {free:.0f} GB free" + ("" if disk["writable"] else ", not writable")
        yield line(name, status, found, "make room or choose another: output=, HF_HOME, TMPDIR")
    shm = facts["shm"]
    if shm is not None:
        small = shm["total"] < GB
        status = "green" if not small else "red" if len(facts["gpus"]) > 1 else "yellow"
        remedy = "docker run --shm-size 16g (or --ipc host); Kubernetes: an emptyDir of medium Memory at /dev/shm"
        yield line("shared memory", status, f"{shm['total'] / GB:.2f} GB", remedy)
    limits = facts["limits"]
    files = limits["open files"]
    status = "green" if files == -1 or files >= 4096 else "red" if files < 256 else "yellow"
    yield line(
        "open files", status, "unlimited" if files == -1 else str(files), "ulimit -n 65536 (limits.conf: nofile)"
    )
    if facts["gpus"]:
        locked = limits["locked memory"]
        found = "unlimited" if locked == -1 else f"{locked / GB:.3f} GB"
        remedy = "ulimit -l unlimited (limits.conf: memlock), for InfiniBand and pinned offloading"
        yield line("locked memory", "green" if locked == -1 else "yellow", found, remedy)
    processes = limits["processes"]
    if processes != -1 and processes < 1024:
        yield line("processes", "yellow", str(processes), "ulimit -u 65536 (limits.conf: nproc)")


def against(facts: dict[str, Any], here: dict[str, Any], host: str, slots: int) -> Iterator[Line]:
    """Findings about a host beside this machine: what must be the same, and what the hostfile claims."""

    def line(name: str, status: Status, found: str, remedy: str = "") -> Line:
        return Line(host, name, status, found, "" if status == "green" else remedy)

    versions = {"python": facts["python"], **facts["versions"]}
    wanted = {"python": here["python"], **here["versions"]}
    other = [
        f"{name} {versions.get(name, 'absent')} (here {v})" for name, v in wanted.items() if versions.get(name) != v
    ]
    remedy = "install the same versions on every host"
    yield line("same versions", "red" if other else "green", ", ".join(other) or "as here", remedy)
    same = facts["package"] == here["package"]
    yield line(
        "same paths",
        "green" if same else "red",
        facts["package"],
        f"lead-ds is at {here['package']} here: put the checkout and its environment at the same path, or share the disk",
    )
    count = len(facts["gpus"])
    if count >= slots:
        yield line("slots", "green", f"{slots} of {count} GPUs")
    elif count == 0 and not here["gpus"]:
        yield line("slots", "yellow", f"{slots} processes on the CPU", "a cluster of CPUs: for tests only")
    else:
        yield line("slots", "red", f"the hostfile claims {slots}, there are {count} GPUs", f"write slots={count}")
    busy = facts["busy_ports"]
    found = f"in use: {', '.join(map(str, busy))}" if busy else "29500 and 29501 are free"
    yield line("ports", "yellow" if busy else "green", found, "set MASTER_PORT to another, or end what uses them")
