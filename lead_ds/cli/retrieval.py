"""Commands over a trained model."""

from __future__ import annotations

import typer


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
