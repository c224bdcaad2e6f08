from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lead_ds.prepare.build import prepare
from lead_ds.prepare.kinds import open_source


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Prepare in this process: KIND, SRC, the name of OUT; the manifest must agree with the files."""

    def run(kind: str, src: object, out: str | Path = "out", **options: Any) -> Path:
        folder = tmp_path / out
        own = {name: options.pop(name) for name in ("triples", "corpus", "task", "subset") if name in options}
        prepare(open_source(kind, str(src), folder, **own), folder, shown=False, **options)
        manifest = json.loads((folder / "prepare.json").read_text())
        assert all(source["complete"] for source in manifest["sources"])
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert len(content) == entry["size"]
            assert content.count(b"\n") == entry["rows"] + name.startswith("qrels/")
        assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
        return folder

    return run
