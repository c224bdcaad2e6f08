"""A real sshd of our own on a high port, known to a real ssh: this machine as two hosts, 127.0.0.1 and 127.0.0.2."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lead_ds.engine.distributed.ranks import free_port


@pytest.fixture
def ssh_hosts(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which `ssh 127.0.0.1` and `ssh 127.0.0.2` log in here with a key, host keys checked."""
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin")
    if sshd is None or shutil.which("pdsh") is None or shutil.which("ssh") is None:
        pytest.skip("sshd, ssh and pdsh are not all installed")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    port = free_port()
    public = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"[127.0.0.{n}]:{port} {public}\n" for n in (1, 2)))
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
    )
    (folder / "config").write_text(
        f"Host *\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n  LogLevel ERROR\n"
    )
    # DeepSpeed and pdsh call `ssh` from PATH, without a way to name a configuration.
    shim = folder / "bin" / "ssh"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    shim.chmod(0o755)
    server = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=(folder / "log").open("w"))
    environment = {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
    try:
        deadline = time.monotonic() + 300
        while subprocess.run([str(shim), "-o", "BatchMode=yes", "127.0.0.2", "true"], capture_output=True).returncode:
            if time.monotonic() > deadline:
                pytest.skip("sshd does not let us in: " + (folder / "log").read_text()[-500:])
            time.sleep(0.2)
        yield environment
    finally:
        server.terminate()
        server.wait()
