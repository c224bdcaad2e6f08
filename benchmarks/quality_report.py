"""Tables of the quality benchmark: means over seeds, bootstrap intervals over queries, paired tests against an arm's rivals."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_arms import BY_NAME
from benchmarks.quality_data import OTHERS, TRAINED_ON
from lead_ds.errors import InputError
from lead_ds.io.files import atomic, read_json, write_json
from lead_ds.retrieval.evaluate import compare
from lead_ds.retrieval.metrics import Scores

MEASURE = "nDCG@10"
COLUMNS = ("start", "labels", "response")
RESPONSE = {None: "response", "ce": "response", "de": "response-de", "cb": "response-cb"}  # by teacher
SAMPLES = 2_000
ABOUT = {"start": "student as it is", "teacher-de": "the dual-encoder teacher itself"}

Runs = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> what a run's file holds


def read_runs(folder: Path) -> Runs:
    """Every run's scores in a folder."""
    runs: Runs = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        runs[name][int(seed)] = json.loads(path.read_text("utf-8"))
    return runs


def per_query(runs: dict[int, dict[str, Any]], tests: tuple[str, ...], measure: str) -> dict[str, float]:
    """A measure of every query of some tests, averaged over seeds; {} where a test is missing."""
    values: dict[str, list[float]] = defaultdict(list)
    for run in runs.values():
        for test in tests:
            if test not in run["scores"]:
                return {}
            for query, value in run["scores"][test][measure].items():
                values[f"{test}:{query}"].append(value)
    return {query: sum(found) / len(found) for query, found in values.items()}


def macro(values: dict[str, float], tests: tuple[str, ...]) -> float:
    """The mean over tests of the means over their queries."""
    return float(np.mean([np.mean([v for q, v in values.items() if q.startswith(f"{test}:")]) for test in tests]))


def interval(a: dict[str, float], b: dict[str, float], tests: tuple[str, ...], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the macro difference b - a: queries drawn again within each test."""
    generator, total = np.random.default_rng(seed), np.zeros(SAMPLES)
    for test in tests:
        d = np.array([b[q] - a[q] for q in sorted(a) if q.startswith(f"{test}:")])
        rows = [generator.integers(0, len(d), (500, len(d))) for _ in range(SAMPLES // 500)]
        total += np.concatenate([d[part].mean(1) for part in rows])
    low, high = np.percentile(total / len(tests), [2.5, 97.5])
    return float(low), float(high)


def rows_of(runs: Runs, tests: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each arm: its means, and its differences from the references."""
    table = {name: values for name, found in runs.items() if (values := per_query(found, tests, MEASURE))}
    rows = []
    for name, values in table.items():
        row: dict[str, Any] = {
            "arm": name,
            "about": ABOUT.get(name) or (BY_NAME[name].about if name in BY_NAME else name),
            "seeds": sorted(runs[name]),
            "dates": sorted({str(run.get("date")) for run in runs[name].values()}),
            "mean": macro(values, tests),
            **{test: macro(values, (test,)) for test in tests},
            "by_seed": [macro(per_query({seed: run}, tests, MEASURE), tests) for seed, run in runs[name].items()],
        }
        for key, reference in rivals(name).items():
            if reference in table and reference != name:
                # Of the same seeds, or the draw of a seed would pass for a difference between arms.
                common = runs[name].keys() & runs[reference].keys()
                pair = [{seed: runs[x][seed] for seed in common} if common else runs[x] for x in (reference, name)]
                before, after = (per_query(found, tests, MEASURE) for found in pair)
                # The test sees macro means too: a query weighs by its test's size.
                a, b = (
                    Scores({MEASURE: float(np.mean(list(x.values())))}, {MEASURE: x})
                    for x in (weigh(before, tests), weigh(after, tests))
                )
                found = compare(a, b, MEASURE, samples=10_000)
                low, high = interval(before, after, tests)
                row[f"against_{key}"] = {
                    "arm": reference,
                    "difference": macro(after, tests) - macro(before, tests),
                    "seeds": sorted(common),
                    "interval": [low, high],
                    "p": found.p_value,
                    "test": found.test,
                }
        rows.append(row)
    return rows


def with_earlier(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those earlier ones whose arms they lack."""
    made = {row["arm"] for row in rows}
    return [*rows, *(row for row in earlier if row["arm"] not in made)]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of the arms."""
    order = {name: i for i, name in enumerate(["start", *BY_NAME, "teacher-de"])}
    return sorted(rows, key=lambda row: order.get(row["arm"], len(order)))


def rivals(name: str) -> dict[str, str]:
    """An arm's rivals by column: its student untrained, labels alone, response KL of its own teacher."""
    arm = BY_NAME.get(name)
    if arm is None:
        return {column: column for column in COLUMNS}
    if arm.cut:
        return {"labels": "labels-cut", "response": arm.beside or "response-cut"}
    return {"start": "start", "labels": "labels", "response": arm.beside or RESPONSE[arm.teacher]}


def weigh(values: dict[str, float], tests: tuple[str, ...]) -> dict[str, float]:
    """Values scaled so that their plain mean is the macro mean."""
    sizes = {test: sum(q.startswith(f"{test}:") for q in values) for test in tests}
    return {q: v * len(values) / (len(tests) * sizes[q.split(":")[0]]) for q, v in values.items()}


def write(folder: Path, out: Path, keep: bool = False) -> str:
    """JSON at `out` and the same as a Markdown table beside it; the table.

    keep: rows that `out` has and the runs of `folder` do not make stay. Raises InputError where those were made otherwise.
    """
    runs = read_runs(folder)
    if not runs:
        raise InputError(str(folder), "has no scores", "call `run` first")
    one = next(iter(next(iter(runs.values())).values()))
    facts = {"measure": MEASURE} | {
        key: one.get(key) for key in ("date", "machine", "versions", "steps", "batch", "lr")
    }
    earlier = read_json(out, "leave --keep out") if keep and out.exists() else {}
    if earlier and (different := [key for key in ("measure", "steps", "batch", "lr") if earlier[key] != facts[key]]):
        raise InputError(str(out), f"was made with another {different[0]}", "name another file, or leave --keep out")
    tables = {"trained_on": rows_of(runs, TRAINED_ON), "others": rows_of(runs, OTHERS)}
    trained, others = (in_order(with_earlier(rows, earlier.get(key, []))) for key, rows in tables.items())
    write_json(out, {**facts, "trained_on": trained, "others": others})
    text = "\n\n".join(
        f"### {title}\n\n{markdown(rows, tests)}"
        for title, rows, tests in (
            ("Test splits of the sets trained on", trained, TRAINED_ON),
            ("Sets never trained on", others, OTHERS),
        )
    )
    with atomic(out.with_suffix(".md")) as temporary:
        temporary.write_text(text + "\n", "utf-8")
    return text


def markdown(rows: list[dict[str, Any]], tests: tuple[str, ...]) -> str:
    """A table: nDCG@10 in points, differences with their 95% interval and p."""
    against = [f"against_{column}" for column in COLUMNS]
    against = [key for key in against if any(key in row for row in rows)]
    head = ["arm", "seeds", "mean", *tests, *(key.replace("_", " ") for key in against)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["about"], str(len(row["seeds"])), *(f"{100 * row[key]:.2f}" for key in ("mean", *tests))]
        for key in against:
            found = row.get(key)
            if found is None:
                cells.append("")
                continue
            low, high = (100 * x for x in found["interval"])
            cells.append(f"{100 * found['difference']:+.2f} ({low:+.2f} to {high:+.2f}), p {found['p']:.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
