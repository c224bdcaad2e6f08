"""The launchers, with real processes: arguments and environment arrive; one failure ends all, with its own status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from lead_ds.engine.distributed.ranks import free_port

LAUNCH = Path(__file__).parents[2] / "launch"
ARGUMENTS = [
    "train.steps=10",
    "a b",
    "it's",
    'say "x" $HOME `id` \\',
    "{a: [1, 2]}",
    "100%n",
    "x;echo",
    "*",
    "",
    "output=~/y",
]


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A checkout that holds launch/ and a `lead_ds` that does what a test tells it to."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "lead_ds").mkdir()
    (tmp_path / "lead_ds" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("program.py"), tmp_path / "lead_ds" / "__main__.py")
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    return tmp_path


def environment(house: Path, **more: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**kept, "PYTHON": sys.executable, "TMPDIR": str(house / "tmp"), "DS_ACCELERATOR": "cpu", **more}


def run(house: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(house / "launch" / script), *arguments],
        cwd=house,
        env=environment(house, **{"PROCESSES": "2", **more}),
        capture_output=True,
        text=True,
        timeout=600,
    )


def told(house: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((house / "out").glob("*.json"))]


@pytest.mark.parametrize("script", ["local.sh", "torchrun.sh"])
def test_arguments_and_environment_arrive(house: Path, script: str) -> None:
    done = run(house, script, "tell", str(house / "out"), *ARGUMENTS, NCCL_DEBUG="WARN")
    assert done.returncode == 0, done.stderr
    ranks = told(house)
    assert [(r["RANK"], r["WORLD_SIZE"], r["LOCAL_RANK"]) for r in ranks] == [("0", "2", "0"), ("1", "2", "1")]
    assert all(r["arguments"] == ARGUMENTS and r["nccl"] == "WARN" and r["DS_ACCELERATOR"] == "cpu" for r in ranks)
    assert list((house / "tmp").glob("lead-ds-launch*")) == []  # nothing is left where nothing went wrong


def test_collective_over_two_nodes_without_ssh(house: Path) -> None:
    logs = nodes(house, "sum")
    assert [status for status, _ in logs] == [0, 0], logs
    assert "rank 0 sum 3" in logs[0][1]
    assert "rank 1 sum 3" in logs[1][1]


def test_one_failing_rank_ends_all_and_is_told(house: Path) -> None:
    done = run(house, "local.sh", "fail", "1", "7", "wait", str(house / "out"))
    assert done.returncode == 7
    assert "rank 1 on" in done.stderr
    assert "failed with status 7" in done.stderr
    assert "  error: rank 1 says why" in done.stderr
    assert_dead(house / "out" / "0.pid")


@pytest.mark.slow
def test_failure_is_the_causes_not_its_consequences(house: Path) -> None:
    done = run(house, "local.sh", "fail", "1", "5", "follow")
    assert done.returncode == 5
    assert "launch: rank 1 on" in done.stderr
    assert "launch: rank 0 on" not in done.stderr


@pytest.mark.slow
def test_without_ssh_the_other_node_ends_too(house: Path) -> None:
    (status0, _), (status1, log1) = nodes(house, "fail", "1", "-9", "wait", str(house / "out"))
    assert status0 == status1 == 137
    assert "failed with status 137" in log1
    assert "error: rank 1 says why" in log1
    assert_dead(house / "out" / "0.pid")


@pytest.mark.parametrize(("before", "status"), [([], 129), (["nohup"], 0)])
def test_a_lost_terminal_ends_a_rank_but_under_nohup(house: Path, before: list[str], status: int) -> None:
    place = environment(house, RANK="0", WORLD_SIZE="1", OMP_NUM_THREADS="1")
    command = [*before, sys.executable, "launch/rank.py", "hang up"]
    heard = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        done = subprocess.run(command, cwd=house, env=place, capture_output=True, stdin=subprocess.DEVNULL, timeout=600)
    finally:
        signal.signal(signal.SIGHUP, heard)
    assert done.returncode == status, done.stderr


@pytest.mark.slow
def test_interrupting_leaves_nothing(house: Path) -> None:
    process = subprocess.Popen(
        [str(house / "launch" / "local.sh"), "fail", "9", "1", "wait", str(house / "out")],
        cwd=house,
        env=environment(house, PROCESSES="2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while len(list((house / "out").glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) in (143, 1)
    assert_dead(house / "out" / "0.pid")
    assert_dead(house / "out" / "1.pid")


@pytest.mark.slow
def test_torchrun_restarts(house: Path) -> None:
    done = run(house, "torchrun.sh", "once", "3", RESTARTS="1")
    assert done.returncode == 0, done.stderr
    assert "rank 0 second attempt" in done.stdout
    assert "rank 1 second attempt" in done.stdout


@pytest.mark.parametrize(
    ("command", "resumes"),
    [(["distill"], True), (["warmup", "--of", "student"], True), (["warmup", "--quiet"], True), (["teach"], False)],
)
def test_a_restarted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], resumes: bool
) -> None:
    monkeypatch.syspath_prepend(str(LAUNCH))
    from rank import resumed  # type: ignore[import-not-found]

    config = tmp_path / "run.yaml"
    config.write_text("{teacher: {kind: dual_encoder, path: t}, student: {path: s}, data: {path: d}}")
    call = [command[0], str(config), *command[1:], f"output={tmp_path / 'run'}"]
    root = str(LAUNCH.parent)
    assert resumed(call, root) == call
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert resumed(call, root) == ([*call, "--resume"] if resumes else call)


@pytest.mark.slow
def test_torchrun_says_that_it_waits_for_another_machine(house: Path) -> None:
    waits = {"NODES": "2", "RENDEZVOUS": f"127.0.0.1:{free_port()}", "LEAD_DS_WAIT": "0.1", "PROCESSES": "1"}
    command = [str(house / "launch" / "torchrun.sh"), "once", "0"]
    process = subprocess.Popen(command, cwd=house, env=environment(house, **waits), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("launch: "))
        assert f"waiting for all of 2 machines to meet at {waits['RENDEZVOUS']}: is this started on each" in told
    finally:
        process.terminate()
        process.wait()


def test_torchrun_does_not_retry_wrong_input(house: Path) -> None:
    done = run(house, "torchrun.sh", "wrong", str(house / "out"), RESTARTS="2")
    assert done.returncode == 2, done.stderr
    assert [(house / "out" / f"{rank}.attempts").read_text() for rank in (0, 1)] == ["x", "x"]


def test_hostfile_over_real_ssh(house: Path, ssh_hosts: dict[str, str]) -> None:
    (house / "hostfile").write_text("# two names of this machine\n127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    (house / ".deepspeed_env").write_text("# mine\n\nOWN_SETTING=yes\n")
    settings = {
        **ssh_hosts,
        "HOSTFILE": "hostfile",
        "MASTER_PORT": str(free_port()),
        "LEAD_DS_WATCH_PORT": str(free_port()),
        "NCCL_DEBUG": "WARN",
        "HF_HOME": "/cache/hf home",
        "HF_TOKEN": "secret",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    done = run(house, "deepspeed_hostfile.sh", "tell", str(house / "out"), *ARGUMENTS, **settings)
    assert done.returncode == 0, done.stderr + done.stdout
    ranks = told(house)
    assert [(r["RANK"], r["WORLD_SIZE"], r["LOCAL_RANK"]) for r in ranks] == [("0", "2", "0"), ("1", "2", "0")]
    for rank in ranks:
        assert rank["arguments"] == ARGUMENTS
        assert (rank["nccl"], rank["hf"], rank["DS_ACCELERATOR"]) == ("WARN", "/cache/hf home", "cpu")
        assert rank["own"] == "yes"
        assert rank["isa"] == "AVX2"  # or the ranks' numbers would differ from those of one machine
        assert rank["token"] is None  # it would stand in the process list of every machine

    done = run(house, "deepspeed_hostfile.sh", "fail", "1", "6", "wait", str(house / "out"), **settings)
    assert done.returncode == 6, done.stderr + done.stdout
    assert "error: rank 1 says why" in done.stderr
    assert_dead(house / "out" / "0.pid")


def test_the_real_command_tells_wrong_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(LAUNCH / "local.sh"), "distill", "missing.yaml", "train.steps=10"],
        cwd=tmp_path,
        env=environment(tmp_path, PROCESSES="2", TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: missing.yaml: no such configuration file")
    assert "launch:   error: missing.yaml" in done.stderr


def test_missing_settings_are_wrong_input(house: Path) -> None:
    for script, name in (("no_ssh.sh", "NODES"), ("deepspeed_hostfile.sh", "hostfile")):
        done = run(house, script, "distill", "run.yaml")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {name}: ")


def test_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    scripts = [str(p) for p in sorted(LAUNCH.iterdir()) if p.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 6
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "-x", *scripts], check=True)


def test_kubernetes_job_starts_the_launcher() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        container = replica["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"
        assert (LAUNCH.parent / container["command"][0]).is_file()
        names = {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == names


def nodes(house: Path, *arguments: str) -> list[tuple[int, str]]:
    """`no_ssh.sh` as on two machines: the status and output of each."""
    settings = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PROCESSES": "1"}
    settings["LEAD_DS_WATCH_PORT"] = str(free_port())
    started = [
        subprocess.Popen(
            [str(house / "launch" / "no_ssh.sh"), *arguments],
            cwd=house,
            env=environment(house, NODE_RANK=str(rank), **settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def assert_dead(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
