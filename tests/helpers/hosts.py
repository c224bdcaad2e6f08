"""Two hosts on this machine: network namespaces on a bridge, each with an address, an sshd and a name of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lead_ds.engine.distributed.ranks import free_port
from tests.helpers.launch import ROOT
from tests.helpers.wire import DEVICES, Wire

NAMES = ("lead-a", "lead-b")
PLACES = "/usr/sbin:/sbin:/usr/bin:/bin"
HOSTS = ("ip", "ssh", "ssh-keygen", "sshd", "unshare")  # programs


def sh(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    return subprocess.run(command, check=check, capture_output=True, text=True)


class Hosts:
    """Two network namespaces of this machine; they share its files, as machines of a cluster share a file system.

    wired: the second's cable is a `Wire`, which can be made worse.
    """

    def __init__(self, folder: Path, *, wired: bool = False) -> None:
        self.folder, self.wired = folder, wired
        self.wire: Wire | None = None
        self.tag = f"lds{os.getpid() % 100000}"
        subnet = f"10.{os.getpid() % 200 + 20}.7"
        self.spaces = [f"{self.tag}{i}" for i in range(2)]
        self.addresses = [f"{subnet}.{i + 1}" for i in range(2)]
        self.servers: list[subprocess.Popen] = []

    def open(self) -> None:
        """Make the network and start the servers."""
        bridge = f"{self.tag}br"
        sh("ip", "link", "add", bridge, "type", "bridge")
        sh("ip", "link", "set", bridge, "up")
        for i, (space, address) in enumerate(zip(self.spaces, self.addresses, strict=True)):
            sh("ip", "netns", "add", space)
            if i == 1 and self.wired:
                self.wire = Wire(f"{self.tag}v{i}", f"{self.tag}w")
                sh("ip", "link", "set", f"{self.tag}w", "netns", space, "name", "eth0")
            else:
                sh("ip", "link", "add", f"{self.tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
            sh("ip", "link", "set", f"{self.tag}v{i}", "master", bridge, "up")
            sh("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                sh("ip", "-n", space, "link", "set", device, "up")
            # `ip netns exec` shows these files in place of /etc's: names, which gloo looks up backwards.
            etc = Path("/etc/netns") / space
            etc.mkdir(parents=True)
            names = "".join(f"{a} {n}\n" for a, n in zip(self.addresses, NAMES, strict=True))
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self._keys()
        for space, address in zip(self.spaces, self.addresses, strict=True):
            config = self.folder / f"sshd-{space}"
            config.write_text(
                f"Port 22\nListenAddress {address}\nHostKey {self.folder}/host\nPidFile none\n"
                f"AuthorizedKeysFile {self.folder}/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            )
            log = (self.folder / f"sshd-{space}.log").open("w")
            sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
            # In a name space of its own for the machine's name, too: ranks tell theirs.
            name = NAMES[self.spaces.index(space)]
            command = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c"]
            command += [f'hostname {name} && exec {sshd} -D -e -f "$0"', str(config)]
            self.servers.append(subprocess.Popen(command, stderr=log, start_new_session=True))
        deadline = time.monotonic() + 600
        for name in NAMES:
            while self.on_first("ssh", name, "true").returncode:
                if self.wire is not None:
                    self.wire.check()
                logs = (self.folder / f"sshd-{space}.log" for space in self.spaces)
                assert time.monotonic() < deadline, "\n".join(log.read_text() for log in logs)
                time.sleep(0.3)

    def _keys(self) -> None:
        for name in ("host", "user"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        public = " ".join((self.folder / "host.pub").read_text().split()[:2])
        known = "".join(f"{n},{a} {public}\n" for n, a in zip(NAMES, self.addresses, strict=True))
        (self.folder / "known_hosts").write_text(known)
        (self.folder / "config").write_text(
            f"Host *\n  User root\n  IdentityFile {self.folder}/user\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  StrictHostKeyChecking yes\n"
            "  ServerAliveInterval 5\n  ServerAliveCountMax 3\n"
        )
        # DeepSpeed and pdsh call `ssh` from PATH, without a way to name a configuration.
        shim = self.folder / "bin" / "ssh"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/config "$@"\n')
        shim.chmod(0o755)

    def command(self, *command: str) -> tuple[list[str], dict[str, str]]:
        """A command on the first host, and its environment."""
        environment = {**os.environ, "PATH": f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        words = [
            "ip",
            "netns",
            "exec",
            self.spaces[0],
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {NAMES[0]}; exec "$@"',
        ]
        return [*words, "sh", *command], environment

    def on_first(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first host."""
        words, environment = self.command(*command)
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)

    def launched(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """`launch/deepspeed_hostfile.sh ARGUMENTS` from the first host, one rank on each, and its environment."""
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        words, environment = self.command(str(ROOT / "launch" / "deepspeed_hostfile.sh"), *arguments)
        return words, environment | {
            "HOSTFILE": str(hostfile),
            "PYTHON": sys.executable,
            "MASTER_PORT": str(free_port()),
            "LEAD_DS_WATCH_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TMPDIR": str(self.folder),
        }

    def distill(self, config: Path, *more: str) -> subprocess.Popen:
        """Start `distill` on both hosts, from the first."""
        words, environment = self.launched("distill", str(config), *more)
        with config.with_suffix(".log").open("w") as log:
            return subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def processes(self, host: int, word: str = "") -> list[psutil.Process]:
        """What runs on a host, with `word` in its command line."""
        found = []
        for pid in sh("ip", "netns", "pids", self.spaces[host], check=False).stdout.split():
            try:
                process = psutil.Process(int(pid))
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def cut(self, host: int, up: bool = False) -> None:
        """Take a host's link down, or up again."""
        sh("ip", "link", "set", f"{self.tag}v{host}", "up" if up else "down")

    def close(self) -> None:
        """End what runs on the hosts, and take the network away."""
        for host, space in enumerate(self.spaces):
            for process in self.processes(host):
                process.kill()
            sh("ip", "netns", "del", space, check=False)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        for server in self.servers:
            server.wait()
        if self.wire is not None:
            self.wire.close()
        for i in range(2):
            sh("ip", "link", "del", f"{self.tag}v{i}", check=False)
        sh("ip", "link", "del", f"{self.tag}br", check=False)


def needs(*programs: str, wired: bool = False) -> None:
    """Skip, with the reason, where a program or the permission for namespaces is missing, or for devices of our own."""
    missing = [name for name in programs if shutil.which(name, path=f"{PLACES}:{os.environ['PATH']}") is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (README of launch/ names the packages)")
    if os.getuid():
        pytest.skip("network namespaces need root")
    if wired and not os.access(DEVICES, os.R_OK | os.W_OK):
        pytest.skip(f"{DEVICES} is missing or not permitted")


@contextmanager
def two_hosts(folder: Path, *programs: str, wired: bool = False) -> Iterator[Hosts]:
    """Two hosts with ssh between them; skipped where these, or `programs`, cannot be had."""
    needs(*HOSTS, *programs, wired=wired)
    folder.mkdir(mode=0o700, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    made = Hosts(folder, wired=wired)
    try:
        try:
            made.open()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        except OSError as error:
            pytest.skip(f"no cable of our own can be had here: {error}")
        yield made
    finally:
        made.close()
