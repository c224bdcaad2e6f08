"""Real schedulers over two hosts, which are network namespaces of this machine: `make test-clusters`."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import NAMES, PLACES, Hosts, needs, sh, two_hosts
from tests.helpers.launch import ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They need daemons of their own, and minutes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600))
            item.add_marker("clusters")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two hosts with ssh between them."""
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


CONFIGURATION = """\
ClusterName=lead
SlurmctldHost=lead-control({control})
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A SLURM of its own: munged and slurmctld on this machine, a slurmd on each host, which claims 64 cores and 8 GPUs."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.daemons: list[subprocess.Popen] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def open(self) -> None:
        """Write the configuration, start the daemons, wait until both hosts are idle."""
        control = self.hosts.addresses[0].rpartition(".")[0] + ".254"
        sh("ip", "address", "add", f"{control}/24", "dev", f"{self.hosts.tag}br")
        places = zip(NAMES, self.hosts.addresses, strict=True)
        nodes = "".join(f"NodeName={n} NodeAddr={a} CPUs=64 RealMemory=1000 Gres=gpu:8\n" for n, a in places)
        text = CONFIGURATION.format(control=control, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        for i in range(8):
            os.mknod(self.folder / f"gpu{i}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        # `ip netns exec` mounts /sys anew, without the cgroup file systems, which slurmd then must not look for.
        old = sh("slurmctld", "-V").stdout.split()[1] < "23.11"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")
        for name in ("state", *(f"spool-{n}" for n in NAMES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        places = {"key-file": key, "log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        places |= {"socket": self.folder / "munge.socket", "pid-file": self.folder / "munged.pid"}
        self._start("munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in places.items()))
        self._wait(lambda: places["socket"].exists(), "munged")
        controller = f"hostname lead-control && exec slurmctld -D -f {self.folder}/slurm.conf"
        self._start("slurmctld", "unshare", "--uts", "sh", "-c", controller)
        for host in range(2):
            self.start_host(host)
        self._wait(lambda: self.ask("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], "slurmd")

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            environment = {**self.environment, "PATH": f"{PLACES}:{os.environ['PATH']}"}
            self.daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            )

    def start_host(self, host: int) -> None:
        """Start a host's slurmd."""
        name = NAMES[host]
        command = f"hostname {name} && exec slurmd -D -f {self.folder}/slurm.conf"
        self._start(
            f"slurmd-{name}", "ip", "netns", "exec", self.hosts.spaces[host], "unshare", "--uts", "sh", "-c", command
        )

    def kill_host(self, host: int) -> None:
        """Nothing runs there any more, as after a loss of power."""
        for process in self.hosts.processes(host):
            process.kill()

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout

    def submit(self, config: Path, *more: str, command: str = "distill", **environment: str) -> int:
        """`sbatch launch/slurm.sbatch COMMAND CONFIG`; the job's number. Its log is beside the configuration."""
        settings = {
            **self.environment,
            "PYTHON": sys.executable,
            "PROCESSES": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "TMPDIR": str(self.folder),
            **environment,
        }
        script = [str(ROOT / "launch" / "slurm.sbatch"), command, str(config), *more]
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={config.with_suffix('.log')}", *script],
            cwd=ROOT,
            env=settings,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", str(number)).split())

    def wait(self, number: int, *states: str, seconds: float = 1800) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        self._wait(lambda: self.job(number).get("JobState") in states, f"job {number} {states}", seconds)
        return self.job(number)

    def _wait(self, done: Callable[[], bool], what: str, seconds: float = 1800) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"waited for {what}\n{self.ask('scontrol', 'show', 'job')}\n{logs}")
            time.sleep(0.5)

    def close(self) -> None:
        """End the daemons."""
        for host in range(2):
            self.kill_host(host)
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


@pytest.fixture(scope="module")
def slurm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """SLURM over the two hosts."""
    needs("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    made = Slurm(hosts, tmp_path_factory.mktemp("slurm"))
    try:
        made.open()
        yield made
    finally:
        made.close()
