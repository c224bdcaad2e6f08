"""The tables of `benchmarks.billions`."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean
from typing import Any

Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
    """Markdown: the teachers alone, beside a student, and through a cache."""
    found = [row for row in rows if row["part"] in ("alone", "adapter")]
    lines = [
        "| teacher | placement | processes | loading, s | parameters held, MiB (of the whole) | own memory between forwards "
        "| most in a forward | `plan` | loading, at most | forward, s | gathering all layers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *[alone(row) for row in found],
    ]
    found = [row for row in rows if row["part"] in ("distill", "cached")]
    lines += [
        "\n| teacher | placement | steps | killed after, resumed: equal losses | most of a process, MiB | `plan` | ratio "
        "| step, s (first half, second half) | growth of memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *[beside(row) for row in found],
    ]
    found = [row for row in rows if row["part"] == "teach"]
    lines += ["\n| teacher | placement | `teach`, s (processor) | most of a process, MiB |", "|---|---|---|---|"]
    for row in found:
        spans, peaks = ([rank[name] for rank in row["ranks"]] for name in ("seconds", "peak"))
        processor = mean(rank["processor"] for rank in row["ranks"])
        lines.append(
            f"| {row['model']} | {row['placement']} | {max(spans):.0f} ({processor:.0f}) | {max(peaks):,.0f} |"
        )
    return "\n".join(lines)


def teacher_planned(row: Row) -> float:
    """MiB that the plan gives a process for its teacher in a forward, its activations apart, and gloo's copy of a gather."""
    plan = row["plan"]
    return (
        sum(plan["parts"][name] for name in ("teacher shard", "teacher gathered layers")) + plan["gloo"] + plan["host"]
    )


def planned(plan: Row) -> float:
    """MiB of a process in a run. Of DeepSpeed's buckets only what gradients fill: a CPU's untouched pages take nothing."""
    parts = plan["parts"]
    buckets = min(parts["communication buffers"], 2 * parts["student gradients"])
    return sum(parts.values()) - parts["communication buffers"] + buckets + plan["gloo"] + plan["host"]


def alone(row: Row) -> str:
    """A teacher's row: the process that holds or takes most."""
    ranks = row["ranks"]
    worst = {name: max(rank[name] for rank in ranks) for name in ranks[0] if isinstance(ranks[0][name], (int, float))}
    share = worst["parameters_held"] / worst["parameters_whole"]
    gathers = "-"
    if "gather_seconds" in worst:
        gathers = f"{worst['gather_seconds']:.1f} s, {worst['gathered'] / worst['gather_seconds']:,.0f} MiB/s"
    name = row["model"] + (", LoRA" if row["part"] == "adapter" else "")
    cells = [
        name,
        row["placement"],
        str(len(ranks)),
        f"{worst['load_seconds']:.0f}",
        f"{worst['parameters_held']:,.0f} ({share:.3f})",
        f"{worst['held_after']:,.0f}",
        f"{worst['forward_peak']:,.0f}",
        f"{teacher_planned(row):,.0f}",
        f"{worst['load_peak']:,.0f}",
        f"{mean(ranks[0]['forward_seconds'][1:]):.1f}",
        gathers,
    ]
    return f"| {' | '.join(cells)} |"


def beside(row: Row) -> str:
    """A run's row: the process that takes most."""
    ranks = row["ranks"]
    peak = max(rank["peak"] for rank in ranks)
    steps = ranks[0]["steps"]
    spans = [after[1] - before[1] for before, after in pairwise(steps)]
    half = len(spans) // 2
    plan = planned(row["plan"]) if "plan" in row else None
    cells = [
        row["model"],
        row["placement"] + (", cached" if row["part"] == "cached" else ""),
        str(row["steps"]),
        f"{row['killed_after']}: {row['taken_twice']} taken twice, {'equal' if row['equal'] else 'NOT EQUAL'}",
        f"{peak:,.0f}",
        "-" if plan is None else f"{plan:,.0f}",
        "-" if plan is None else f"{peak / plan:.2f}",
        f"{mean(spans[:half]):.2f}, {mean(spans[half:]):.2f}",
        f"{steps[-1][3] - steps[1][3]:+,.0f}",
    ]
    return f"| {' | '.join(cells)} |"
