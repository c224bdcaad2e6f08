"""What each layer of a teacher is worth, through its own head and through a tuned lens: a table and a plot."""

from __future__ import annotations

from typing import Any

from lead_ds.report.plots import ACCENT, INK, PALE, figure_of, png, tidy
from lead_ds.report.summary import Table, aligned


def lens_table(record: dict[str, Any]) -> str:
    """A fitted lens's record as text: NLL and accuracy of each layer on held-out groups, before and after."""
    rows: Table = [["layer", "NLL", "", "lens", "accuracy", "", "lens"]]
    for row in record["layers"]:
        before, after = row["before"], row["after"]
        cells = [f"{before['nll']:.3f}", "->", f"{after['nll']:.3f}"]
        rows.append([str(row["layer"]), *cells, f"{before['accuracy']:.3f}", "->", f"{after['accuracy']:.3f}"])
    for name in ("final", "chance"):
        rows.append([name, f"{record[name]['nll']:.3f}", "", "", f"{record[name]['accuracy']:.3f}", "", ""])
    groups = record["groups"]
    scope = f"on {groups['report']} held-out groups of {record['passages']}"
    return f"{scope} (fitted on {groups['fit']}, stopped by {groups['stop']})\n\n{aligned(rows)}"


def layer_table(measured: dict[str, Any]) -> str:
    """Layers as they were measured: NLL and accuracy of each, and by chance."""
    rows: Table = [["layer", "NLL", "accuracy"]]
    names = [*map(str, measured.get("layers", range(len(measured["nll"]) - 1))), "final"]
    for name, nll, accuracy in zip(names, measured["nll"], measured["accuracy"], strict=True):
        rows.append([name, f"{nll:.3f}", f"{accuracy:.3f}"])
    rows.append(["chance", f"{measured['chance']:.3f}", f"{1 / measured['passages']:.3f}"])
    return f"on {measured['groups']} training groups of {measured['passages']}\n\n{aligned(rows)}"


def lens_plot(record: dict[str, Any]) -> bytes:
    """PNG: NLL and accuracy by layer, before and after; the final state and chance as lines."""
    figure = figure_of(9.0, 3.4)
    layers = [row["layer"] for row in record["layers"]]
    for i, (key, title) in enumerate((("nll", "NLL of the positive (nats)"), ("accuracy", "accuracy"))):
        axes = figure.add_subplot(1, 2, i + 1)
        for when, colour, label in (("before", PALE, "own head"), ("after", ACCENT, "tuned lens")):
            values = [row[when][key] for row in record["layers"]]
            axes.plot(layers, values, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(record["final"][key], color=INK, linewidth=1, label="final state")
        axes.axhline(record["chance"][key], color=INK, linewidth=1, linestyle=":", label="chance")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("teacher layer")
        tidy(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return png(figure)
