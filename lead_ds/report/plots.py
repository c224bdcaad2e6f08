"""The plots of a run, as PNG."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np

from lead_ds.report.record import RunRecord

DPI = 130
INK, PALE, ACCENT = "#1f2933", "#c3ccd5", "#0b6e99"
COLOURS = ("#0b6e99", "#c2571a", "#4d7c32", "#8a4f9e", "#a1343c", "#6b6b2a", "#2a5d5d", "#7a5230")
MAPS = (
    ("weights", "weight of the layer pair", "viridis"),
    ("nll", "teacher layer's NLL of the positive (nats)", "viridis_r"),
    ("teacher_entropy", "entropy of the teacher layer's distribution (nats); near 0: saturated", "cividis"),
)


def draw(run: RunRecord) -> dict[str, bytes]:
    """File name -> PNG of every plot that the run has rows for: losses, layers, metrics."""
    plots = {"losses.png": _losses(run), "layers.png": _layers(run), "metrics.png": _metrics(run)}
    return {name: png for name, png in plots.items() if png is not None}


def _losses(run: RunRecord) -> bytes | None:
    names = [name for name in ("loss", *run.part_names) if run.series(name)[0]]
    if not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = figure_of(4.2 * columns, 2.7 * rows)
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = run.series(name)
        axes.plot(steps, values, color=PALE, linewidth=0.8)
        width = max(1, len(values) // 50)
        axes.plot(steps, _smooth(values, width), color=ACCENT, linewidth=1.6)
        axes.set_title(name.replace("_", " "), fontsize=10, loc="left")
        if i >= len(names) - columns:
            axes.set_xlabel("step")
        tidy(axes)
    return png(figure)


def _layers(run: RunRecord) -> bytes | None:
    found = [(run.layer_map(name), title, colours) for name, title, colours in MAPS]
    maps = [(item, title, colours) for item, title, colours in found if item is not None]
    if not maps:
        return None
    layers = len(maps[0][0][0])
    figure = figure_of(9.0, (1.0 + 0.14 * max(layers, 6)) * len(maps))
    for i, ((values, edges), title, colours) in enumerate(maps):
        axes = figure.add_subplot(len(maps), 1, i + 1)
        axes.set_facecolor("#eceff2")  # a layer that was not selected
        mesh = axes.pcolormesh(edges, np.arange(layers + 1) - 0.5, values, cmap=colours)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel("teacher layer")
        axes.set_yticks(range(0, layers, max(1, -(-layers // 12))))
        if i == len(maps) - 1:
            axes.set_xlabel("step (grey: not selected)")
        axes.spines[:].set_visible(False)
        figure.colorbar(mesh, ax=axes, pad=0.01).outline.set_visible(False)
    return png(figure)


def _metrics(run: RunRecord) -> bytes | None:
    if not run.measures:
        return None
    figure = figure_of(7.0, 3.6)
    axes = figure.add_subplot()
    for i, name in enumerate(run.measures):
        rows = [row for row in run.evaluations if name in row["evaluation"]]
        values = [row["evaluation"][name] for row in rows]
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        axes.plot([row["step"] for row in rows], values, style, color=colour, marker="o", markersize=3.5, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("value")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    tidy(axes)
    return png(figure)


def _smooth(values: list[float], width: int) -> np.ndarray:
    """A centred moving mean that shortens at the ends."""
    kernel = np.ones(2 * width - 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def figure_of(width: float, height: float) -> Any:
    """An empty figure, of inches."""
    # Figure without pyplot: no display, no global state, nothing to close.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any) -> None:
    """Axes as all plots here have them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)


def png(figure: Any) -> bytes:
    """A figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
