"""One page about a run, with everything in it: no script, no file beside it, nothing from the network."""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path

from lead_ds.errors import RunError
from lead_ds.report.plots import draw
from lead_ds.report.profile import operator_table, part_table, read_profile
from lead_ds.report.record import RunRecord, read_run_record
from lead_ds.report.summary import Table, fact_table, loss_table, metric_table, summarize

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } img { max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .9rem .2rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e8ec; }
td:first-child, th:first-child, table.facts td { text-align: left; overflow-wrap: anywhere; }
table.facts td:first-child { white-space: nowrap; color: #52606d; }
pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: 13px; }
"""
_CAPTIONS = {
    "losses.png": ("Losses", "Every loss before its weight; pale: each logged step, dark: a moving mean."),
    "layers.png": ("Layers", "What the layer loss saw of each teacher layer, at the steps that selected it."),
    "metrics.png": ("Metrics", "Evaluations during training."),
}


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write plots (PNG), summary.txt and index.html of a run into `out` (default: RUN/report); the page's path.

    Raises InputError when the run has no metrics, RunError when a file cannot be written.
    """
    run = read_run_record(run_dir)
    folder = Path(out) if out is not None else Path(run_dir) / "report"
    plots = draw(run)
    files = {**plots, "summary.txt": summarize(run).encode(), "index.html": _page(run, plots).encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f".{name}.tmp"
            partial.write_bytes(content)
            os.replace(partial, folder / name)
    except OSError as error:
        raise RunError(folder, f"cannot be written: {error}", "choose another folder with --out") from None
    return folder / "index.html"


def _page(run: RunRecord, plots: dict[str, bytes]) -> str:
    body = [html_table(fact_table(run), facts=True)]
    for name, png in plots.items():
        heading, caption = _CAPTIONS[name]
        data = base64.b64encode(png).decode()
        body += [
            f"<h2>{heading}</h2>",
            f"<p>{caption}</p>",
            f'<img alt="{heading}" src="data:image/png;base64,{data}">',
        ]
        if name == "losses.png":
            body.append(html_table(loss_table(run)))
        elif name == "metrics.png":
            body.append(html_table(metric_table(run)))
    profile = read_profile(run.folder)
    if profile is not None:
        tables = [part_table(profile), operator_table(profile)] if profile["operators"] else [part_table(profile)]
        body += ["<h2>Where a step's time went</h2>", *map(html_table, tables)]
    if run.config:
        body += ["<h2>Configuration</h2>", f"<pre>{escape(run.config)}</pre>"]
    return html_page(f"Run {run.folder.resolve().name}", body)


def html_page(title: str, body: list[str]) -> str:
    """A page of these HTML elements under a heading."""
    name = escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n' + "\n".join(
        [f"<h1>{name}</h1>", *body, "</body></html>\n"]
    )


def html_table(table: Table, *, facts: bool = False) -> str:
    """A table, its first row as heading; `facts`: names and values, without one."""
    rows = []
    for i, row in enumerate(table):
        cell = "th" if i == 0 and not facts else "td"
        rows.append("<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in row) + "</tr>")
    return ('<table class="facts">' if facts else "<table>") + "".join(rows) + "</table>"
