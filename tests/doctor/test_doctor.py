"""The doctor on this machine and on real ssh hosts; what it calls red, from facts altered one at a time."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lead_ds.cli import operations
from lead_ds.doctor import checks, diagnose, facts
from lead_ds.doctor.diagnosis import about_host, clock
from lead_ds.doctor.hosts import Answer, Host, ask, read_hostfile, remote_python, ssh_command
from lead_ds.errors import InputError


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return facts.facts()


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {line.name: line.status for line in checks.machine(found, "x")}


def test_this_machine() -> None:
    code = "import typer; from lead_ds.cli import operations as o; a = typer.Typer(); o.add_commands(a); a(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert report["ok"] is (done.returncode == 0)
    assert {"Python", "packages", "ninja", "shared memory", "DeepSpeed operators"} <= {
        x["name"] for x in report["lines"]
    }
    assert done.stderr == ""


def test_table_and_status() -> None:
    app = typer.Typer()
    operations.add_commands(app)
    done = CliRunner().invoke(app, ["doctor"])
    assert "this machine" in done.output
    assert done.exit_code == (0 if "nothing is red" in done.output else 1)


GPU = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 << 30}
CUDA = {"cuda": "13.0", "available": True, "count": 8, "nccl": True, "gloo": True}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Python", {"python": "3.9.1"}),
        ("packages", {"missing": ["ninja>=1.11"]}),
        ("GPUs", {"gpus": [GPU], "torch": {**CUDA, "cuda": None, "available": False}}),
        ("GPUs", {"gpus": [GPU], "driver": "470.1", "torch": {**CUDA, "available": False}}),
        ("NCCL", {"gpus": [GPU], "torch": {**CUDA, "nccl": False}}),
        ("C++ compiler", {"gpus": [GPU], "torch": CUDA, "compiler": None}),
        ("ninja", {"ninja": None}),
        ("DeepSpeed", {"operators": "ImportError: no"}),
        ("compile lock", {"locks": [{"path": "/x/lock", "age": 600.0, "held": False}]}),
        ("torch", {"torch": {"error": "libcudart.so.13: cannot open"}}),
        (
            "working folder",
            {"disk": {"working folder": {"path": "/d", "total": 10**12, "free": 10**8, "writable": True}}},
        ),
        ("model cache", {"disk": {"model cache": {"path": "/d", "total": 10**12, "free": 10**12, "writable": False}}}),
        ("shared memory", {"gpus": [GPU, GPU], "torch": CUDA, "shm": {"total": 64 << 20}}),
        ("open files", {"limits": {"open files": 128, "locked memory": -1, "processes": -1}}),
    ],
)
def test_red_has_a_remedy(here: dict[str, Any], name: str, change: dict[str, Any]) -> None:
    found = {**copy.deepcopy(here), **change}
    line = next(line for line in checks.machine(found, "x") if line.name == name)
    assert line.status == "red"
    assert line.remedy
    assert statuses(here).get(name) != "red"


def test_a_host_that_differs(here: dict[str, Any]) -> None:
    def names(change: dict[str, Any], slots: int = 1) -> dict[str, str]:
        return {
            line.name: line.status for line in checks.against({**here, **change}, {**here, "gpus": [GPU]}, "x", slots)
        }

    versions = {**here["versions"], "torch": "2.0.0"}
    assert names({"versions": versions})["same versions"] == "red"
    assert names({"package": "/elsewhere/lead_ds"})["same paths"] == "red"
    assert names({"gpus": [GPU] * 4}, slots=8)["slots"] == "red"
    assert names({"gpus": []}, slots=1)["slots"] == "red"
    assert names({"gpus": [GPU] * 8}, slots=8) == {
        "same versions": "green",
        "same paths": "green",
        "slots": "green",
        "ports": names({})["ports"],
    }
    assert names({"busy_ports": [29500]})["ports"] == "yellow"
    assert [clock("x", offset).status for offset in (0.1, -5.0, 120.0)] == ["green", "yellow", "red"]
    strange = about_host(Host("x", 1), Answer(facts={"python": 3}, reached=True), here)
    assert any(line.status == "red" and line.remedy for line in strange)


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=id slots=1",
        "a;reboot slots=1",
        "$(id) slots=1",
        "host slots=many",
        "host slots=0",
        "host",
        "a slots=1\na slots=2",
        "# nothing",
    ],
)
def test_hostfile_that_cannot_be_used(tmp_path: Path, line: str) -> None:
    file = tmp_path / "hostfile"
    file.write_text(line + "\n")
    with pytest.raises(InputError) as error:
        read_hostfile(file)
    assert str(file) in str(error.value)


def test_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("# cluster\n\nnode-0 slots=8  # first\nme@10.0.0.7   slots=4\n")
    assert read_hostfile(file) == [Host("node-0", 8), Host("me@10.0.0.7", 4)]
    with pytest.raises(InputError):
        read_hostfile(tmp_path / "none")
    with pytest.raises(InputError):
        ssh_command("-oProxyCommand=id", "true", None)


def test_remote_command_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a $(touch pwned) 'b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NCCL_DEBUG", "x; touch pwned; $(touch pwned)")
    command = remote_python("json.tool", ["--help"])
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_hosts_over_real_ssh(tmp_path: Path, ssh_hosts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", ssh_hosts["PATH"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    file = tmp_path / "hostfile"
    file.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    report = diagnose(file)
    lines = {(line.host, line.name): line for line in report.lines}
    for host in ("127.0.0.1", "127.0.0.2"):
        assert lines[host, "ssh"].status == "green"
        assert lines[host, "same versions"].status == "green"
        assert lines[host, "same paths"].status == "green"
        assert lines[host, "clock"].status == "green"
    # Nobody listens there: one red line with its remedy, and the others are still measured.
    assert [line.host for line in report.red] == ["127.0.0.3"]
    assert report.red[0].remedy
    measured = next(line for line in report.lines if line.name.startswith("all-reduce"))
    assert measured.host == "between 2 hosts"
    assert "GB/s" in measured.found


def test_host_without_lead_ds(ssh_hosts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", ssh_hosts["PATH"])
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    answer = ask(Host("127.0.0.1", 1), None)
    assert answer.reached
    assert "lead-ds does not run there" in answer.problem
    assert "/nowhere/python" in answer.remedy


def test_unknown_host_key_is_refused(ssh_hosts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", ssh_hosts["PATH"])
    shim = Path(ssh_hosts["PATH"].split(os.pathsep)[0])
    (shim.parent / "known_hosts").write_text("")
    answer = ask(Host("127.0.0.1", 1), None)
    assert not answer.reached
    assert "fingerprint" in answer.remedy
