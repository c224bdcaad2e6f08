"""A folder that holds one thing is not made to hold another, too: status 2, one line, and all in it stays as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.test_bad_retrieval import lead_ds, made  # noqa: F401

pytest.importorskip("faiss")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("holds", ["data", "model", "vectors", "index"])
def test_commands_refuse_the_folder_of_another_thing(
    holds: str,
    made: Path,  # noqa: F811
    configure: Callable[..., Path],
) -> None:
    folder, run = made / holds, configure("run")
    run.write_text(yaml.safe_dump(yaml.safe_load(run.read_text()) | {"output": str(folder)}))
    before = digests(folder)
    commands = {
        "encode": (
            "encode",
            "--model",
            made / "model",
            "--data",
            made / "data",
            "--out",
            folder,
            "--precision",
            "int8",
        ),
        "index": ("index", "--vectors", made / "vectors", "--factory", "HNSW8", "--out", folder),
        "teach": ("teach", run, "--out", folder),
        "distill": ("distill", run),
    }
    for name, command in commands.items():
        status, told = lead_ds(*command)
        assert status == 2, (name, told)
        assert told.splitlines()[-1].startswith("error: "), (name, told)
        assert str(folder) in told
        assert digests(folder) == before, name
