"""Fixtures of several folders: a collection and models made once a session, and configurations of short runs."""

from __future__ import annotations

import os

# As in the processes that tests start, so that sums have one order; and as many at once as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

# Triton reads this once, when it is first imported: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers.rooms import make_rooms, settings


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and tiny random models of several architectures: see `make_rooms`."""
    return make_rooms(tmp_path_factory.mktemp("rooms"))


@pytest.fixture
def configure(rooms: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration; its output is `tmp_path/NAME`."""

    def write(name: str = "run", teacher: str = "dual_encoder", **sections: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(rooms, tmp_path / name, teacher, **sections)))
        return path

    return write
