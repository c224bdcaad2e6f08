"""A plan for people (rich) and for programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lead_ds.plan.placement import Estimate, Plan, Requirements

if TYPE_CHECKING:
    from rich.table import Table


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, elements, overrides."""
    r = plan.requirements
    models = {"student": (r.student, r.student_element)}
    models |= {teacher.key: (teacher.shape, teacher.element) for teacher in r.teachers}
    return {
        "cluster": {**asdict(plan.cluster), "world": plan.cluster.world},
        "models": {
            name: {
                "parameters": shape.published,
                "held_parameters": shape.numel,
                "trained_parameters": shape.trainable if name == "student" or r.cotrained else 0,
                "bytes": shape.numel * element,
                "layers": shape.layers,
                "published_layers": shape.published_layers,
            }
            for name, (shape, element) in models.items()
        },
        "student_activations": [
            {
                "length": length,
                "batch_size": r.config.train.batch_size,
                "kept": r.student_activations(False, length),
                "checkpointed": r.student_activations(True, length),
            }
            for length in r.lengths
        ],
        "placements": [_estimate(estimate) for estimate in plan.placements],
        "recommended": _estimate(plan.recommended) if plan.recommended else None,
        "changes": plan.changes,
    }


def plan_table(plan: Plan) -> Table:
    """Parts by placement, in GB (10^9 bytes)."""
    from rich.table import Table

    cluster = plan.cluster
    table = Table(
        title=f"GB on each of {cluster.nodes} x {cluster.gpus} GPUs of {cluster.gpu_memory / 1e9:.0f} GB",
        title_justify="left",
    )
    table.add_column("part")
    for estimate in plan.placements:
        table.add_column(
            "student" if estimate.choice.placement == "none" else estimate.choice.placement, justify="right"
        )
    for use in plan.placements[0].uses:
        table.add_row(use, *(_gb(estimate.uses[use]) for estimate in plan.placements))
    table.add_section()
    table.add_row("together", *(f"[bold]{_gb(e.total)}[/]" for e in plan.placements))
    table.add_row("fits", *("[green]yes[/]" if e.fits else "[red]no[/]" for e in plan.placements))
    if any(e.host for e in plan.placements):
        table.add_row("memory of each machine", *(_gb(e.host) for e in plan.placements))
    if any(e.disk for e in plan.placements):
        table.add_row("NVMe of each machine", *(_gb(e.disk) for e in plan.placements))
    return table


def activation_table(requirements: Requirements) -> Table:
    """The student's activations by length, with and without checkpointing; they grow with the batch in proportion."""
    from rich.table import Table

    batch, group_size = requirements.config.train.batch_size, requirements.group_size
    table = Table(
        title=f"GB of student activations: {batch} queries with {group_size} passages each", title_justify="left"
    )
    table.add_column("tokens of the longest text")
    for length in requirements.lengths:
        table.add_column(str(length), justify="right")
    for name, checkpointing in (("kept", False), ("gradient checkpointing", True)):
        sizes = (requirements.student_activations(checkpointing, length) for length in requirements.lengths)
        table.add_row(name, *map(_gb, sizes))
    return table


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        **asdict(estimate.choice),
        "parts": estimate.uses,
        "total": estimate.total,
        "host": estimate.host,
        "disk": estimate.disk,
        "fits": estimate.fits,
    }


def _gb(size: int) -> str:
    return "-" if size == 0 else f"{size / 1e9:.2f}"
