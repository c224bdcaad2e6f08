"""The doctor's hosts are the launchers': this machine, over a real ssh."""

from tests.launch.conftest import ssh_hosts

__all__ = ["ssh_hosts"]
