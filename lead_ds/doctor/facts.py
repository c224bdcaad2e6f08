"""Facts about the machine that this process runs on, as plain values. `python -m lead_ds.doctor.facts` prints them as JSON.

Runs on every host of a hostfile through ssh: reads only, needs no root, starts no GPU work.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lead_ds
from lead_ds.doctor.locks import batons

PORTS = (29500, 29501)  # where launchers meet, and where launch/rank.py watches
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "numpy", "tokenizers", "safetensors")
OPERATORS = ("fused_adam", "cpu_adam", "async_io")


def facts() -> dict[str, Any]:
    """Everything the checks look at."""
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "executable": sys.executable,
        "package": str(Path(lead_ds.__file__).parent),
        "folder": os.getcwd(),
        "versions": versions(),
        "missing": missing_requirements(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus(),
        "driver": driver(),
        "torch": torch_facts(),
        "nvcc": tool("nvcc", "--version", extra=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")),
        "compiler": tool(os.environ.get("CXX") or "c++", "--version"),
        "ninja": tool("ninja", "--version", extra=str(Path(sys.executable).parent)),
        "operators": operators(),
        "triton": importable("triton"),
        "locks": batons(compile_folders()),
        "faiss": importable("faiss"),
        "disk": {name: disk(path) for name, path in folders().items()},
        "shm": disk(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        "limits": limits(),
        "busy_ports": [port for port in PORTS if not port_is_free(port)],
        "free_port": free_port(),
    }


def compile_folders() -> list[Path]:
    """Where PyTorch's extensions, DeepSpeed's operators among them, and Triton's kernels are compiled."""
    home = Path.home()
    torch = os.environ.get("TORCH_EXTENSIONS_DIR") or home / ".cache" / "torch_extensions"
    triton = os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"
    return [Path(torch), Path(triton)]


def versions() -> dict[str, str]:
    """Versions of the packages that must agree between hosts."""
    found = {"lead-ds": lead_ds.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def missing_requirements() -> list[str]:
    """Requirements of lead-ds (without its extras) that the environment does not meet; none where it is not installed."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("lead-ds") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    missing = []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier} (here {version})")
    return missing


def gpus() -> list[dict[str, Any]]:
    """Name and bytes of every NVIDIA GPU, as the driver reports."""
    rows = []
    for line in query("--query-gpu=name,memory.total").splitlines():
        name, _, memory = line.rpartition(",")
        if name and memory.strip().split()[0].isdigit():
            rows.append({"name": name.strip(), "memory": int(memory.split()[0]) << 20})
    return rows


def driver() -> str | None:
    """The NVIDIA driver's version."""
    lines = query("--query-gpu=driver_version").splitlines()
    return lines[0].strip() if lines else None


def query(what: str) -> str:
    """nvidia-smi's answer; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, what, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def torch_facts() -> dict[str, Any]:
    """What torch was built for and whether it sees the GPUs."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": str(error)}
    return {
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "count": torch.cuda.device_count(),
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


def tool(name: str, flag: str, extra: str = "") -> str | None:
    """The first line that a program prints of its version; None where it is absent."""
    program = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), extra]))
    if program is None:
        return None
    try:
        done = subprocess.run([program, flag], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    release = next((line for line in lines if "release" in line), None)  # nvcc's first line is its name
    return (release or (lines[0] if lines else "")).strip() if done.returncode == 0 else None


def operators() -> dict[str, bool] | str:
    """Which DeepSpeed operators could be compiled here; the error where DeepSpeed cannot be imported."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if not gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it finds nothing better
    try:
        from deepspeed.ops.op_builder.all_ops import ALL_OPS
    except Exception as error:  # its import runs compilers and drivers: anything may come out of it
        return f"{type(error).__name__}: {error}"
    found = {}
    for name in OPERATORS:
        if name in ALL_OPS:
            try:
                found[name] = bool(ALL_OPS[name].is_compatible(verbose=False))
            except Exception:  # as above
                found[name] = False
    return found


def importable(name: str) -> str | None:
    """The version of a module that is installed."""
    if importlib.util.find_spec(name) is None:
        return None
    for package in (name, f"{name}-cpu", f"{name}-gpu", f"{name}-gpu-cu12"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def folders() -> dict[str, Path]:
    """The folders that runs write to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "working folder": Path.cwd(),
        "model cache": Path(os.environ.get("HF_HOME") or cache / "huggingface"),
        "temporary folder": Path(tempfile.gettempdir()),
    }


def disk(path: Path) -> dict[str, Any]:
    """Size, free bytes and whether it can be written, of the disk a path is (or would be) on."""
    there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    usage = shutil.disk_usage(there)
    return {"path": str(path), "total": usage.total, "free": usage.free, "writable": os.access(there, os.W_OK)}


def limits() -> dict[str, int]:
    """Soft limits; -1: none."""
    names = {"open files": resource.RLIMIT_NOFILE, "locked memory": resource.RLIMIT_MEMLOCK}
    names["processes"] = resource.RLIMIT_NPROC
    soft = {name: resource.getrlimit(number)[0] for name, number in names.items()}
    return {name: -1 if value == resource.RLIM_INFINITY else value for name, value in soft.items()}


def port_is_free(port: int) -> bool:
    """Whether a server could listen on a TCP port."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    # Libraries may print while they are imported: the facts are the last line.
    print("\n" + json.dumps(facts()), flush=True)
