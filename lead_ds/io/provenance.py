"""Where a run came from: command, versions, git revision, machine. Written beside its results."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lead_ds

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "accelerate", "triton", "safetensors", "numpy")


def provenance(command: Sequence[str], world: int, **facts: Any) -> dict[str, Any]:
    """What `run.json` holds."""
    return {
        "command": list(command),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": {"lead-ds": lead_ds.__version__, "python": platform.python_version(), **versions()},
        "host": platform.node(),
        "processes": world,
        "device": device_name(),
        **facts,
    }


def device_name() -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The revision of lead-ds's checkout, marked `-dirty` where it has changes; None where it is not one."""
    folder = Path(lead_ds.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
