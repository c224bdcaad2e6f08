"""The documentation site builds, strictly, and asks for nothing from the network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_builds_without_a_warning_and_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?://')
    for page in tmp_path.rglob("*.html"):
        assert not loaded.search(page.read_text("utf-8")), page


def test_names_every_command_and_every_page() -> None:
    from lead_ds.cli.main import app

    names = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback
    }
    pages = " ".join(page.read_text("utf-8") for page in (ROOT / "docs" / "how-to").glob("*.md"))
    assert {name for name in names if f"lead-ds {name}" not in pages and f"make {name}" not in pages} <= {"demo"}
