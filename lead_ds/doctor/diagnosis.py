"""This machine, then each host, then the links between them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lead_ds.doctor import checks
from lead_ds.doctor.facts import facts
from lead_ds.doctor.hosts import Answer, Host, ask, read_hostfile
from lead_ds.doctor.link import measure
from lead_ds.doctor.report import Line, Report

CLOCK_YELLOW, CLOCK_RED = 1.0, 60.0  # seconds


def diagnose(hostfile: Path | None = None, *, ssh_port: int | None = None) -> Report:
    """All findings about this machine, and about every host of `hostfile`.

    Raises InputError where the hostfile cannot be used.
    """
    hosts = read_hostfile(hostfile) if hostfile is not None else []
    report = Report()
    with ThreadPoolExecutor(max_workers=min(64, len(hosts)) or 1) as pool:
        asked = [pool.submit(ask, host, ssh_port) for host in hosts]
        here = facts()
        report.lines += checks.machine(here, "this machine")
        answers = [future.result() for future in asked]
    for host, answer in zip(hosts, answers, strict=True):
        report.lines += about_host(host, answer, here)
    able = [(h, a) for h, a in zip(hosts, answers, strict=True) if a.facts is not None]
    if len(able) > 1:
        report.lines.append(between([h for h, _ in able], [a.facts or {} for _, a in able], ssh_port))
    return report


def about_host(host: Host, answer: Answer, here: dict[str, Any]) -> list[Line]:
    """Findings about one host: of its own checks only what is not green."""
    if not answer.reached:
        return [Line(host.name, "ssh", "red", answer.problem, answer.remedy)]
    lines = [Line(host.name, "ssh", "green", "reachable without a password")]
    if answer.facts is None:
        return [*lines, Line(host.name, "lead-ds", "red", answer.problem, answer.remedy)]
    try:
        lines += checks.against(answer.facts, here, host.name, host.slots)
        lines.append(clock(host.name, answer.offset))
        lines += [line for line in checks.machine(answer.facts, host.name) if line.status != "green"]
    except (KeyError, TypeError, ValueError, AttributeError):
        lines.append(
            Line(host.name, "lead-ds", "red", "answers in another form", "install the same version of lead-ds")
        )
    return lines


def clock(host: str, offset: float) -> Line:
    """How far a host's clock is from this one's."""
    far = abs(offset)
    found = f"{offset:+.2f} s from this machine's"
    if far < CLOCK_YELLOW:
        return Line(host, "clock", "green", found)
    return Line(host, "clock", "red" if far > CLOCK_RED else "yellow", found, "run chrony or systemd-timesyncd on it")


def between(hosts: Sequence[Host], answers: Sequence[dict[str, Any]], ssh_port: int | None) -> Line:
    """A collective over all hosts that can take part."""
    names = f"between {len(hosts)} hosts"
    backend = "nccl" if all(a["gpus"] and a["torch"].get("available") for a in answers) else "gloo"
    address = hosts[0].name.rpartition("@")[2]
    found = measure(hosts, address, int(answers[0]["free_port"]), backend, ssh_port)
    if "error" in found:
        remedy = (
            "name the network: export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0; open the ports between hosts"
        )
        return Line(names, f"all-reduce ({backend})", "red", found["error"], remedy)
    latency, bandwidth = found["latency"] * 1e6, found["bandwidth"] / 1e9
    measured = f"{latency:.0f} us, {bandwidth:.2f} GB/s"
    slow = bandwidth < 1.0
    remedy = (
        "under 10 Gbit/s: a sharded teacher's gathers will dominate; use zero_hpz_partition_size, or a faster network"
    )
    return Line(names, f"all-reduce ({backend})", "yellow" if slow else "green", measured, remedy if slow else "")
