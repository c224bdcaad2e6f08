"""The command line: every command a few lines over the rooms below, and one place where errors become words."""

from lead_ds.cli.main import main

__all__ = ["main"]
