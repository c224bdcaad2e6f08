"""The cable of the stress test's two hosts does what it says; two hosts that meet over a bad one give what they always give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hosts import HOSTS, needs, two_hosts
from tests.helpers.launch import ROOT
from tests.helpers.wire import CALM, CUT, Weather

SERVE = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 9999)) as server:
    print("ready", flush=True)
    while True:
        link, _ = server.accept()
        digest = hashlib.md5()
        while block := link.recv(65536):
            digest.update(block)
        link.sendall(digest.digest())
"""
SEND = """
import hashlib, random, socket, sys
data = random.Random(0).randbytes(300_000)
with socket.create_connection((sys.argv[1], 9999), timeout=float(sys.argv[2])) as link:
    link.sendall(data)
    link.shutdown(socket.SHUT_WR)
    assert link.recv(16) == hashlib.md5(data).digest()
"""


def test_a_wire_drops_doubles_delays_and_is_cut(tmp_path: Path) -> None:
    with two_hosts(tmp_path / "hosts", wired=True) as hosts:
        wire, there = hosts.wire, hosts.addresses[1]
        assert wire is not None
        other = ["ip", "netns", "exec", hosts.spaces[1], sys.executable, "-c", SERVE, there]
        with subprocess.Popen(other, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"

            def send(seconds: float) -> int:
                return hosts.on_first(sys.executable, "-c", SEND, there, str(seconds)).returncode

            def sent(weather: Weather) -> tuple[int, int]:
                before = wire.frames
                wire.weather(weather)
                assert send(60) == 0
                carried, dropped = (now - was for now, was in zip(wire.frames, before, strict=True))
                return carried, dropped

            plain, dropped = sent(CALM)
            assert dropped == 0
            assert sent(Weather(drop=0.1))[1] > 0
            assert sent(Weather(twice=1.0))[0] > 1.5 * plain
            assert sent(Weather(late=0.01, varies=0.02))[0] > 0
            wire.weather(CUT)
            assert send(2) != 0
            assert sent(CALM)[0] > 0
            server.kill()


@pytest.mark.slow
def test_a_distillation_over_a_bad_network(tmp_path: Path) -> None:
    needs(*HOSTS, "pdsh", wired=True)
    pytest.importorskip("faiss")
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "tests.stress", "4", "--log", str(log), "--only", "bad network: distill"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{log.read_text()}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum("victims" in row for row in rows) == 4
    assert all(row["equal"] for row in rows if "kills" in row)
