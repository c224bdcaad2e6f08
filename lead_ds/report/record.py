"""What a run wrote: metrics.jsonl, config.yaml, run.json.

K selected layer pairs of a step, T teacher layers, S steps or stretches of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.errors import InputError
from lead_ds.io.json_text import parse_json

RATES = ("lr", "queries_per_second")  # of a step, beside its losses
DEEPEST = 10_000  # layers of a teacher: a line that names a deeper one is damaged
COLUMNS = 240  # of a heat map: longer runs are averaged over stretches of steps


@dataclass
class RunRecord:
    """A run's rows: `steps` of training and `evaluations`, by step; its configuration and facts as they are there."""

    folder: Path
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    config: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def part_names(self) -> list[str]:
        """Names of the losses, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.steps for name in row.get("parts", {})))

    @property
    def measures(self) -> list[str]:
        """Names of the evaluation's measures."""
        return list(dict.fromkeys(name for row in self.evaluations for name in row["evaluation"]))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of `loss`, of a part, of `lr` or of `queries_per_second`."""
        pairs = [(row["step"], row.get("parts", {}).get(name, row.get(name))) for row in self.steps]
        known = [(step, float(value)) for step, value in pairs if value is not None]
        return [step for step, _ in known], [value for _, value in known]

    def layer_map(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A statistic of the selected teacher layers over time: values [T, S] and the steps' edges [S + 1].

        name: weights, nll, kl, teacher_entropy. NaN where a layer was not selected; a mean over the steps of a stretch
        otherwise. None without a layer loss.
        """
        rows = [row for row in self.steps if name in row.get("layers", {})]
        if not rows:
            return None
        layers = 1 + max(max(row["layers"]["teacher"]) for row in rows)
        edges = np.linspace(rows[0]["step"] - 1, rows[-1]["step"], min(COLUMNS, len(rows)) + 1)
        sums, counts = np.zeros((2, layers, len(edges) - 1))
        for row in rows:
            column = min(int(np.searchsorted(edges, row["step"], side="left")) - 1, len(edges) - 2)
            for layer, value in zip(row["layers"]["teacher"], row["layers"][name], strict=True):
                if value is not None and math.isfinite(value):
                    sums[layer, column] += value
                    counts[layer, column] += 1
        with np.errstate(invalid="ignore"):
            return sums / np.where(counts, counts, np.nan), edges


def read_run_record(folder: str | Path) -> RunRecord:
    """Read a run's folder. A last line of metrics.jsonl that a kill cut short is passed over.

    Raises InputError when the folder, or any metric in it, is missing, and for a line that is wrong.
    """
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise InputError(path, "no such file", "name the output folder of a run that has logged a step") from None
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            if not isinstance(row["step"], int) or not _is_number(row["step"]):
                raise TypeError
            kind = evaluations if isinstance(row.get("evaluation"), dict) else steps
            if not (_is_evaluation(row["evaluation"]) if kind is evaluations else _is_step(row)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}", "not a row of metrics", "delete this line") from None
        kind[row["step"]] = row
    if not steps and not evaluations:
        raise InputError(path, "holds no metrics yet", "wait for the run's first logged step")
    return RunRecord(
        folder,
        [steps[step] for step in sorted(steps)],
        [evaluations[step] for step in sorted(evaluations)],
        _text(folder / "config.yaml"),
        _facts(folder / "run.json"),
    )


def _is_evaluation(values: dict[str, Any]) -> bool:
    return all(map(_is_number, values.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_step(row: dict[str, Any]) -> bool:
    """Whether a row is one of training: numbers, and statistics of layers that are as many as the layers."""
    parts, layers = row.get("parts", {}), row.get("layers", {})
    if not isinstance(parts, dict) or not isinstance(layers, dict):
        return False
    rates = [row[name] for name in RATES if row.get(name) is not None]
    if not all(map(_is_number, (row["loss"], *parts.values(), *rates))):
        return False
    chosen = layers.get("teacher", [])
    if not all(isinstance(layer, int) and 0 <= layer < DEEPEST for layer in chosen):
        return False
    statistics = [values for name, values in layers.items() if name != "teacher"]
    return all(
        isinstance(values, list)
        and len(values) == len(chosen) > 0
        and all(value is None or _is_number(value) for value in values)
        for values in statistics
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _facts(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
