"""Fixtures of several folders: a collection and models made once a session, and configurations of short runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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
