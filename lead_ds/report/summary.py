"""A run in a few lines of text."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lead_ds.report.record import RunRecord

Table = list[list[str]]


def loss_table(run: RunRecord) -> Table:
    """Of the loss and each part: the mean over the first and the last tenth of the logged steps."""
    rows: Table = [["loss", "first tenth", "last tenth", "change"]]
    for name in ["loss", *run.part_names]:
        _, values = run.series(name)
        if values:
            tenth = max(1, len(values) // 10)
            first, last = fmean(values[:tenth]), fmean(values[-tenth:])
            rows.append([name, f"{first:.4f}", f"{last:.4f}", f"{last - first:+.4f}"])
    return rows


def metric_table(run: RunRecord) -> Table:
    """Of each measure: the first, best and last evaluation, and the step of the best."""
    rows: Table = [["measure", "first", "best", "at step", "last"]]
    for name in run.measures:
        found = [(row["evaluation"][name], row["step"]) for row in run.evaluations if name in row["evaluation"]]
        best, step = max(found, key=lambda pair: pair[0])
        rows.append([name, f"{found[0][0]:.4f}", f"{best:.4f}", str(step), f"{found[-1][0]:.4f}"])
    return rows


def fact_table(run: RunRecord) -> Table:
    """Where the run came from."""
    facts = run.facts
    rows: Table = [["run", str(run.folder)]]
    last = max(row["step"] for row in [*run.steps, *run.evaluations])
    rows.append(["steps", str(last)])
    _, rates = run.series("queries_per_second")
    if rates:
        rows.append(["queries per second", f"{fmean(rates):.1f}"])
    for key in (
        "command",
        "started",
        "git_revision",
        "device",
        "processes",
        "kernels",
        "versions",
        "teacher",
        "teachers",
    ):
        if facts.get(key) is not None:
            rows.append([key.replace("_", " "), _plain(facts[key])])
    return rows


def summarize(run: RunRecord) -> str:
    """The tables as plain text."""
    parts = ["\n".join(f"{name}: {value}" for name, value in fact_table(run))]
    parts += [aligned(table) for table in (loss_table(run), metric_table(run)) if len(table) > 1]
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(item, dict) for item in value) else " ").join(map(_plain, value))
    return str(value)


def aligned(table: Table) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
