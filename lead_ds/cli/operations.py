"""Commands around a run: plan (before it), doctor (of the machines it will use)."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from lead_ds.cli import options


def plan(
    config: Path = options.CONFIG,
    overrides: list[str] | None = options.OVERRIDES,
    gpus: int = typer.Option(1, "--gpus", min=1, help="GPUs of each machine."),
    nodes: int = typer.Option(1, "--nodes", min=1, help="Machines."),
    gpu_memory: float = typer.Option(80.0, "--gpu-memory", min=1.0, help="GB (10^9 bytes) of each GPU."),
    host_memory: float | None = typer.Option(
        None, "--host-memory", min=1.0, help="GB of each machine; default: enough."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: bytes."),
    write: Path | None = typer.Option(
        None, "--write", help="Write the DeepSpeed configurations that it recommends here."
    ),
) -> None:
    """Memory per GPU by part, for every way to place the teacher, and the one that fits. Loads no weights, needs no GPU.

    Parameters, gradients and optimizer state are exact; activations are counted by running the model on tensors without
    data. Exit status 1 where nothing fits.
    """
    from rich.console import Console

    from lead_ds.config import load_config
    from lead_ds.plan import Cluster, activation_table, make_plan, plan_json, plan_table
    from lead_ds.plan.advice import advise, describe, write_configurations
    from lead_ds.plan.requirements import requirements

    settings = load_config(config, overrides or [])
    room = None if host_memory is None else int(host_memory * 1e9)
    cluster = Cluster(gpus=gpus, nodes=nodes, gpu_memory=int(gpu_memory * 1e9), host_memory=room)
    made = make_plan(requirements(settings), cluster)
    files = write_configurations(made, settings.deepspeed, write) if write is not None and made.recommended else []
    if as_json:
        print(json.dumps({**plan_json(made), "files": [str(file) for file in files]}, indent=1))
    else:
        console = Console()
        for line in describe(made):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(plan_table(made))
        console.print(activation_table(made.requirements))
        for line in advise(made, config, files):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if made.recommended is None:
        raise typer.Exit(1)


def doctor(
    hostfile: Path | None = typer.Option(
        None, "--hostfile", help="DeepSpeed's: `host slots=N` lines. Checks each host."
    ),
    ssh_port: int | None = typer.Option(None, "--ssh-port", min=1, max=65535, help="Port of the hosts' ssh."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """What this machine, and each host of a hostfile, lacks - each with its remedy. Exit status 1 if anything is red."""
    from lead_ds.doctor import diagnose, show

    if hostfile is None:
        options.unused({"--ssh-port": ssh_port}, "is of the hosts of a hostfile", "add --hostfile, or take it out")
    report = diagnose(hostfile, ssh_port=ssh_port)
    if as_json:
        print(json.dumps(report.plain(), indent=1))
    else:
        show(report)
    if report.red:
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (plan, doctor):
        app.command()(command)
