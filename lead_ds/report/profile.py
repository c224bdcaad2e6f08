"""The tables of a run's profile, from `RUN/profile/profile.json`: see `lead_ds.engine.records.profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds.io.json_text import parse_json
from lead_ds.report.summary import Table, aligned


def read_profile(run: Path) -> dict[str, Any] | None:
    """What a run's profile holds; None without one, or where it is damaged."""
    try:
        profile = parse_json((run / "profile" / "profile.json").read_text(encoding="utf-8"))
        part_table(profile), operator_table(profile)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return profile


def part_table(profile: dict[str, Any]) -> Table:
    """Each part of a step: milliseconds, share of the step, and of the slowest rank."""
    several = profile["processes"] > 1
    rows: Table = [["part of a step", "ms", "share", *(["slowest rank"] if several else [])]]
    whole = sum(row["ms"] for row in profile["parts"])
    for row in profile["parts"]:
        slowest = [f"{row['slowest_ms']:.1f} (rank {row['slowest_rank']})"] if several else []
        rows.append([row["part"], f"{row['ms']:.1f}", f"{row['ms'] / whole:.1%}", *slowest])
    return [*rows, ["step", f"{whole:.1f}", "100.0%", *([""] if several else [])]]


def operator_table(profile: dict[str, Any]) -> Table:
    """The operators (on a GPU: kernels) with the most time of their own in a step."""
    rows: Table = [["operator", "ms", "of the traced step", "calls"]]
    for row in profile["operators"]:
        share = f"{row['ms'] / profile['traced_step_ms']:.1%}"
        name = row["name"] if len(row["name"]) <= 60 else row["name"][:57] + "..."
        rows.append([name, f"{row['ms']:.2f}", share, f"{row['calls']:.0f}"])
    return rows


def profile_text(profile: dict[str, Any]) -> str:
    """The profile as lines of text."""
    first, last = profile["first_step"], profile["first_step"] + profile["steps"] - 1
    times = f"median {profile['step_ms']['p50']:.1f} ms, 95% under {profile['step_ms']['p95']:.1f} ms"
    lines = [f"steps {first} to {last} on {profile['device']}, {profile['processes']} process(es): {times}"]
    lines += ["", aligned(part_table(profile))]
    if profile["operators"]:
        traced = f"traced steps took {profile['traced_step_ms']:.1f} ms each"
        exposed = f"communication that no computing hid {profile['exposed_communication_ms']:.1f} ms"
        lines += ["", f"{traced}, {exposed}", "", aligned(operator_table(profile))]
    return "\n".join(lines) + "\n"
