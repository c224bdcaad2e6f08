"""A folder that is written step by step has one owner, whatever became of the one before."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError, RunError
from lead_ds.io import owner
from lead_ds.io.owner import RECORD, owned
from lead_ds.retrieval.mine import mine
from tests.helpers.tiny import tiny_dataset

HOLD = """
import sys, time
from pathlib import Path
from lead_ds.io import owner
owner.BEAT = 0.1
if len(sys.argv) > 2:
    here = owner._here()
    owner._here = lambda: here | {"host": sys.argv[2]}
with owner.owned(sys.argv[1], "another run"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *host: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *host], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.1)
    monkeypatch.setattr(owner, "SILENT", 2.0)


def test_two_owners_on_one_host(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = hold(folder)
    try:
        told = rf"run: another run is at work here, process {process.pid} on \S+ since 20"
        with pytest.raises(InputError, match=told), owned(folder, "this run"):
            pass
        process.send_signal(signal.SIGSTOP)  # stopped is not gone
        with pytest.raises(InputError, match=told), owned(folder, "this run"):
            pass
    finally:
        process.kill()
        process.wait()
    assert (folder / RECORD).exists()  # it could not take it away
    with owned(folder, "this run"):  # at once
        assert json.loads((folder / RECORD).read_text())["pid"] == os.getpid()
    assert not list(folder.iterdir())


def test_a_number_that_another_process_has_now(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(owner._here() | {"pid": os.getppid(), "started": "1", "token": "x"}))
    with owned(tmp_path, "this run"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"host": 3, "pid": "x"}'])
def test_a_record_that_was_cut(quick: None, tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with owned(tmp_path, "this run"):
        pass


def test_another_host_is_watched_for_a_beat(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = hold(tmp_path, "elsewhere")
    try:
        started = time.monotonic()
        with pytest.raises(InputError, match=rf"process {process.pid} on elsewhere"), owned(tmp_path, "this run"):
            pass
        assert time.monotonic() - started < 2.0  # the first beat tells
        assert "waiting up to 2 s for a sign of life" in capsys.readouterr().err
        process.kill()
        process.wait()
        with owned(tmp_path, "this run"):
            pass
    finally:
        process.kill()
        process.wait()


def test_of_many_that_take_over_one_gets_it(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / RECORD).write_text(json.dumps(owner._here() | {"pid": gone.pid, "started": "1", "token": "x"}))
    won: list[int] = []
    together, leave = threading.Barrier(8), threading.Event()

    def contend(number: int) -> None:
        together.wait()
        try:
            with owned(tmp_path, "one of many"):
                won.append(number)
                leave.wait(20)
        except InputError:
            won.append(-1)
        if len(won) == 8:
            leave.set()

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(number >= 0 for number in won) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interrupt", ["signal.default_int_handler", "signal.SIG_IGN"])  # SIG_IGN: in the background
def test_an_owner_that_was_taken_for_gone_ends(quick: None, tmp_path: Path, interrupt: str) -> None:
    program = f"import signal\nsignal.signal(signal.SIGINT, {interrupt})\n{HOLD}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    taken = json.loads((tmp_path / RECORD).read_text()) | {"token": "another", "who": "a run elsewhere"}
    while process.poll() is None:  # as beats do: one of the old owner's may have come between
        (tmp_path / "new").write_text(json.dumps(taken))
        (tmp_path / "new").replace(tmp_path / RECORD)
        time.sleep(0.03)
    _, told = process.communicate()
    assert process.returncode != 0
    assert "a run elsewhere is at work here" in told
    assert json.loads((tmp_path / RECORD).read_text())["token"] == "another"  # left to the new owner


def test_what_began_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), owned(tmp_path / "run", "this run"):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"), owned(tmp_path / "file", "this run"):
        pass
    with pytest.raises(RunError, match="cannot be made"), owned(tmp_path / "file" / "run", "this run"):
        pass


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    """Files of this process may hold so few bytes as a full disk would take."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(RunError, match="cannot be made"), owned(tmp_path / "new", "another run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_mining_into_one_file_twice(tmp_path: Path) -> None:
    data = Dataset.open(tiny_dataset(tmp_path / "data", passages=20, queries=6))
    with owned(tmp_path, "another lead-ds mine", record=".out.jsonl.owner.json"):
        with pytest.raises(InputError, match="another lead-ds mine is at work here"):
            mine("bm25", data, tmp_path / "out.jsonl", quiet=True)
        mine("bm25", data, tmp_path / "other.jsonl", quiet=True)
