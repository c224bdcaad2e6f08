"""Findings: green, yellow (works, with a limit) or red (would fail), for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Line:
    """One finding about one host; `remedy` is what to do where it is not green."""

    host: str
    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass
class Report:
    """All findings, in order."""

    lines: list[Line] = field(default_factory=list)

    @property
    def red(self) -> list[Line]:
        """The findings that would make a run fail."""
        return [line for line in self.lines if line.status == "red"]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": not self.red, "lines": [asdict(line) for line in self.lines]}


def show(report: Report) -> None:
    """Print a table; then the remedies of what is red, each on a line that can be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    hosts = list(dict.fromkeys(line.host for line in report.lines))
    for host in hosts:
        table = Table(title=host, title_justify="left", show_header=False, expand=False)
        for column in ("what", "found", "remedy"):
            table.add_column(column, overflow="fold")
        for line in report.lines:
            if line.host == host:
                mark = {"green": "ok", "yellow": "limit", "red": "RED"}[line.status]
                found = Text(f"{mark}: {line.found}", style=line.status)
                table.add_row(Text(line.name), found, Text(line.remedy))
        console.print(table)
    if report.red:
        console.print(f"{len(report.red)} red:", style="bold red")
        for line in report.red:
            # Not by rich: what other machines answered is not markup.
            print(f"  {line.host}: {line.name}: {line.found} -> {line.remedy}")
    else:
        console.print("nothing is red", style="bold green")
