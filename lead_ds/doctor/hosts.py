"""The hosts of a hostfile, asked over ssh: no password, host keys checked, time limits, nothing unquoted in a command."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError

NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.:_-]*")
CONNECT_SECONDS = 5
ANSWER_SECONDS = 90
FORWARDED = ("NCCL_", "GLOO_", "TORCH_NCCL_", "LD_LIBRARY_PATH", "DS_ACCELERATOR")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int


@dataclass(frozen=True)
class Answer:
    """What a host answered: its facts and its clock's offset in seconds; or a problem with its remedy."""

    facts: dict[str, Any] | None = None
    offset: float = 0.0
    problem: str = ""
    remedy: str = ""
    reached: bool = False


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a DeepSpeed hostfile: `name slots=N` a line, # comments.

    Raises InputError for a missing or empty file, a line of another form, a name that ssh could misread, a host named twice.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(path, "no such hostfile", "see launch/hostfile.example") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read: {error}", "check the path") from None
    hosts: list[Host] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if match is None or not NAME.fullmatch(match[1]) or not 0 < int(match[2]) <= 1024:
            raise InputError(f"{path}:{number}", f"not a host: {line!r}", "write `name slots=N`")
        if match[1] in {host.name for host in hosts}:
            raise InputError(f"{path}:{number}", f"{match[1]} is named twice", "one line for each host")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise InputError(path, "names no host", "write `name slots=N` lines")
    return hosts


def ssh_command(host: str, remote: str, port: int | None) -> list[str]:
    """The argument list that runs a shell command on a host."""
    if not NAME.fullmatch(host):
        raise InputError(host, "is not a host name", "correct the hostfile")
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", f"ConnectTimeout={CONNECT_SECONDS}"]
    options += ["ServerAliveInterval=5", "ServerAliveCountMax=3"]
    command = ["ssh", "-T", *(part for option in options for part in ("-o", option))]
    if port is not None:
        command += ["-p", str(port)]
    return [*command, "--", host, remote]


def remote_python(module: str, arguments: Sequence[str] = ()) -> str:
    """A shell command that runs a module with this interpreter, in this folder, in this network environment."""
    kept = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(FORWARDED)]
    folder = str(Path(__file__).resolve().parents[2])
    python = ["env", *kept, f"PYTHONPATH={folder}", sys.executable, "-m", module, *arguments]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(python)}"


def ask(host: Host, port: int | None) -> Answer:
    """Ask a host for its facts."""
    if shutil.which("ssh") is None:
        return Answer(
            problem="no ssh on this machine", remedy="apt-get install openssh-client, or use launch/no_ssh.sh"
        )
    command = ssh_command(host.name, f"date +%s.%N; {remote_python('lead_ds.doctor.facts')}", port)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()  # ssh itself gives up after its time limits
        arrived = time.time()
        rest, errors = process.communicate(timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Answer(problem=f"no answer in {ANSWER_SECONDS} s", remedy="look at the host's load and its disks")
    if not re.fullmatch(r"\d+\.\d+\n", first):
        return unreachable(host, errors)
    try:
        facts = json.loads(rest.strip().splitlines()[-1])
        return Answer(facts=facts, offset=float(first) - arrived, reached=True)
    except (ValueError, IndexError):
        last = (errors.strip().splitlines() or ["no output"])[-1]
        remedy = f"the folder {os.getcwd()}, {sys.executable} and lead-ds must be there as they are here"
        return Answer(problem=f"lead-ds does not run there: {last[:300]}", remedy=remedy, reached=True)


def unreachable(host: Host, errors: str) -> Answer:
    """Why ssh failed, and what helps."""
    last = (errors.strip().splitlines() or ["ssh ended without a word"])[-1][:300]
    name = shlex.quote(host.name)
    if "Host key verification failed" in errors or "host key is known" in errors:
        remedy = f"ssh {name} once by hand and compare the fingerprint"
    elif "Permission denied" in errors:
        remedy = f"ssh-copy-id {name} (a key without a passphrase, or an agent)"
    elif "resolve" in errors:
        remedy = "add it to /etc/hosts or DNS"
    else:
        remedy = f"is it up, does sshd listen? Try: ssh -v {name}"
    return Answer(problem=last, remedy=remedy)
