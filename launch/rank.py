"""One rank under any launcher: runs `python -m lead_ds ARGUMENTS` and ends with all the others when one of them fails.

Every launcher of this folder starts this file once per rank. It
- finds its place (RANK, WORLD_SIZE, LOCAL_RANK) in what DeepSpeed, torchrun, SLURM, Open MPI or MPICH set;
- passes the command's output on, and keeps a copy in $LEAD_DS_LOGS/rank-N.log;
- when any rank fails, ends its own command. Rank 0 listens on LEAD_DS_WATCH_PORT and the others stay connected to it.
  So a dead rank or a dead machine is noticed in seconds, not at a collective's timeout. Every rank then returns the
  failing rank's status, and that rank's last lines are shown;
- after a restart by torchrun or SLURM, continues a `distill` with --resume.
It imports nothing but the standard library: it costs every rank a few megabytes.
"""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

GRACE = 2.0  # seconds in which other ranks' failures are awaited before one is named the cause
SILENT = 5.0  # seconds that a rank which printed nothing waits for another to say what was wrong
PLACES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"),
}
# What a rank prints that fails because another one is gone: such a failure is not the cause.
CONSEQUENCE = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|gloo|nccl|tcpstore|sigterm", re.I)


class Command:
    """The command of this rank, with its last lines."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path | None) -> None:
        self.last: collections.deque[str] = collections.deque(maxlen=25)
        self.file = log.open("ab", buffering=0) if log else None
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        streams = ((self.process.stdout, sys.stdout.buffer), (self.process.stderr, sys.stderr.buffer))
        self.threads = [threading.Thread(target=self._copy, args=pair, daemon=True) for pair in streams]
        for thread in self.threads:
            thread.start()

    def end(self, patience: float = 10.0) -> None:
        """Ask it to end; insist after so many seconds."""
        self.process.terminate()
        timer = threading.Timer(patience, self.process.kill)
        timer.daemon = True
        timer.start()

    def wait(self) -> int:
        """Its status as a shell gives it, once its output has been passed on."""
        status = self.process.wait()
        for thread in self.threads:
            thread.join(timeout=5)
        return status if status >= 0 else 128 - status

    def _copy(self, source, target) -> None:  # type: ignore[no-untyped-def]
        for line in iter(source.readline, b""):
            self.last.append(line.decode("utf-8", "replace").rstrip())
            try:
                target.write(line)
                target.flush()
                if self.file:
                    self.file.write(line)
            except OSError:
                continue  # nobody reads any more, or the disk is full: keep the command from blocking


class Watch:
    """Tells every rank of the first failure. `verdict` is that failure: rank, host, status, lines."""

    def __init__(self, rank: int, world: int, address: str, port: int, command: Command) -> None:
        self.rank, self.world, self.address, self.port, self.command = rank, world, address, port, command
        self.verdict: dict | None = None
        self.told = threading.Event()
        self.linked = threading.Event()
        self.failures: list[dict] = []
        self.finished = 0
        self.peers: list[socket.socket] = []
        self.link: socket.socket | None = None
        threading.Thread(target=self._listen if rank == 0 else self._follow, daemon=True).start()

    def fail(self, failure: dict) -> dict:
        """Report this rank's failure; the one that was found to be the cause."""
        if self.rank == 0:
            self._failed(failure)
        elif self.linked.wait(3):
            self._send(self.link, {"failed": failure})
        else:
            return failure  # rank 0 cannot be reached
        self.told.wait(GRACE + 5)
        return self.verdict or failure

    def linger(self) -> None:
        """Rank 0 stays a moment after a failure, so that those who come late hear of it, too."""
        if self.rank == 0:
            time.sleep(1 if len(self.peers) + 1 >= self.world else 4)

    def finish(self) -> None:
        """This rank is done. Rank 0 stays for the others, who would take its going for a failure."""
        if self.rank:
            if self.linked.wait(3):
                self._send(self.link, {"done": self.rank})
            return
        late = time.monotonic() + 60
        while self.finished < self.world - 1 and not self.told.wait(0.1):
            if len(self.peers) < self.world - 1 and time.monotonic() > late:
                return

    def _listen(self) -> None:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1" if self.address in ("127.0.0.1", "localhost") else "", self.port))
        except OSError as error:
            say(f"port {self.port} cannot be watched ({error}): ranks end at their collectives' timeouts instead")
            return
        server.listen(self.world)
        while True:
            peer = server.accept()[0]
            self.peers.append(peer)
            if self.verdict:
                self._send(peer, {"end": self.verdict})
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        rank = None
        for message in self._messages(peer):
            rank = message.get("rank", rank)
            if "failed" in message:
                self._failed(message["failed"])
            elif "done" in message:
                self.finished += 1
                return
        if rank is not None:
            failure = {
                "rank": rank,
                "host": "its machine",
                "status": 1,
                "lines": ["connection lost: it died or was cut off"],
            }
            self._failed(failure)

    def _failed(self, failure: dict) -> None:
        self.failures.append(failure)
        if len(self.failures) == 1:
            threading.Timer(GRACE, self._judge).start()

    def _judge(self) -> None:
        self.verdict = min(
            self.failures, key=lambda f: (bool(CONSEQUENCE.search("\n".join(f["lines"]))), not f["lines"])
        )
        for peer in self.peers:
            self._send(peer, {"end": self.verdict})
        self.told.set()
        self.command.end()

    def _follow(self) -> None:
        while self.link is None:
            try:
                self.link = socket.create_connection((self.address, self.port), timeout=5)
            except OSError:
                time.sleep(0.2)
        self.link.settimeout(None)
        self._send(self.link, {"rank": self.rank})
        self.linked.set()
        for message in self._messages(self.link):
            if "end" in message:
                self.verdict = message["end"]
                break
        if self.verdict is None and self.command.process.poll() is None:
            self.verdict = {
                "rank": 0,
                "host": self.address,
                "status": 1,
                "lines": ["connection lost: it died or was cut off"],
            }
        self.told.set()
        self.command.end()

    @staticmethod
    def _messages(link: socket.socket):  # type: ignore[no-untyped-def]
        # A machine that loses power sends no farewell: probe it.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            with link.makefile("r", encoding="utf-8", errors="replace") as lines:
                while line := lines.readline(1 << 20):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        yield message
        except (OSError, ValueError):
            return

    @staticmethod
    def _send(link: socket.socket | None, message: dict) -> None:
        try:
            if link is not None:
                link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass


def main() -> int:
    """Run this rank; its status."""
    environment = dict(os.environ)
    for name, sources in PLACES.items():
        found = next((environment[s] for s in (name, *sources) if s in environment), None)
        if found is not None:
            environment[name] = re.match(r"\d*", found).group() or "0"  # type: ignore[union-attr]
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    logs = Path(environment["LEAD_DS_LOGS"]) if environment.get("LEAD_DS_LOGS") else None
    if logs:
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    arguments = [a for a in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", a)]
    if environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        before = json.loads((logs / "failed.json").read_text()) if logs and (logs / "failed.json").exists() else {}
        if before.get("status") == 2:
            return 2  # the input was wrong: it still is
        arguments = resumed(arguments, root)
    elif environment.get("SLURM_RESTART_COUNT", "0") != "0":  # the job was queued again
        arguments = resumed(arguments, root)

    command = Command(
        [sys.executable, "-u", "-m", "lead_ds", *arguments], environment, logs and logs / f"rank-{rank}.log"
    )
    received: list[int] = []
    # Asked from outside, a run still finishes its step and saves a checkpoint.
    patience = float(os.environ.get("LEAD_DS_STOP_SECONDS", "60"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, lambda n, _: (received.append(n), command.end(patience)))
    port, address = environment.get("LEAD_DS_WATCH_PORT"), environment.get("MASTER_ADDR", "127.0.0.1")
    watch = Watch(rank, world, address, int(port), command) if port and world > 1 else None
    status = command.wait()
    if status == 0 and not received:
        if watch:
            watch.finish()
        if watch is None or watch.verdict is None:
            if logs and logs.name.startswith("lead-ds-launch."):  # nobody named this folder, nobody will look there
                (logs / f"rank-{rank}.log").unlink(missing_ok=True)
            return 0
    host = socket.gethostname()
    if received:
        status, lines = 128 + received[0], [f"ended by {signal.Signals(received[0]).name}"]
    else:
        lines = list(command.last)
    failure = {"rank": rank, "host": host, "status": status, "lines": lines}
    interrupted = bool(received)  # the launcher may end us while we report
    until = time.monotonic() + SILENT
    while watch and not lines and watch.verdict is None and time.monotonic() < until:
        time.sleep(0.05)  # wrong input is reported by one rank: the others have nothing to show for it
    verdict = watch.verdict or watch.fail(failure) if watch else failure
    if verdict["rank"] == rank or (rank == 0 and verdict["host"] != host):
        if logs:
            (logs / "failed.json").write_text(json.dumps(verdict))
        if not interrupted:
            show(verdict)
    if watch:
        watch.linger()
    return int(verdict["status"])


def resumed(arguments: list[str], root: str) -> list[str]:
    """A restarted `distill` or `warmup` continues where its output folder already holds a run."""
    if arguments[:1] not in (["distill"], ["warmup"]) or "--resume" in arguments:
        return arguments
    sys.path.insert(1, root)
    from lead_ds.config import load_config
    from lead_ds.engine.training.warmup import load_warmup
    from lead_ds.errors import InputError

    load = load_config if arguments[0] == "distill" else load_warmup
    plain = [a for before, a in pairwise(arguments) if not a.startswith("-") and before != "--of"]
    try:
        holds = (Path(load(plain[0], plain[1:]).output) / "config.yaml").exists()
    except (InputError, IndexError):
        return arguments  # the command itself will say what is wrong
    return [*arguments, "--resume"] if holds else arguments


def show(failure: dict) -> None:
    """A failed rank's last lines."""
    name = f"rank {failure['rank']} on {failure['host']}"
    killed = (
        " (killed; often by the kernel, for memory: see dmesg)" if failure["status"] == 128 + signal.SIGKILL else ""
    )
    say(f"{name} failed with status {failure['status']}{killed}; its last lines:")
    for line in failure["lines"]:
        say("  " + "".join(c for c in str(line) if c.isprintable() or c == "\t"))


def say(text: str) -> None:
    """One line to stderr."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
