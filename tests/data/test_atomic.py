"""A file is there whole or not at all, and kills leave no more behind than the next writing of it takes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from lead_ds.errors import RunError
from lead_ds.io.files import atomic
from lead_ds.io.shards import damage, mapped, save_arrays
from lead_ds.models.student_dir import whole_folder


def killed_in_the_middle(path: Path) -> None:
    """A process that is killed while it writes to `path`."""
    pid = os.fork()
    if pid == 0:
        with atomic(path) as temporary:
            temporary.write_text("half of it, and longer than what comes next")
            time.sleep(60)
    while not any(file.stat().st_size for file in path.parent.iterdir() if file != path):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_what_a_kill_leaves_is_taken_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    for _ in range(2):
        killed_in_the_middle(path)
        assert path.read_text() == "before"
        assert len(list(tmp_path.iterdir())) == 2
    with atomic(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_two_at_once_and_one_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic(path) as first:
        with atomic(path) as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"

    def failing() -> None:
        with atomic(path) as third:
            third.write_text("third")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot be written: .*(check the folder and the free space)"):
        failing()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_another_file_in_its_place_is_let_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    other.write_text("other")
    place = tmp_path / f".x.{socket.gethostname()}.tmp"
    for make in (place.symlink_to, place.hardlink_to):
        make(other)
        with atomic(path) as temporary:
            temporary.write_text("x")
        assert (path.read_text(), other.read_text()) == ("x", "other")
        place.unlink(missing_ok=True)
    name = tmp_path / ("n" * 240)
    with atomic(name) as temporary:
        temporary.write_text("long")
    assert name.read_text() == "long"


def test_a_disk_that_is_full_when_tensors_are_written(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:

        def writing() -> None:
            with atomic(tmp_path / "x.safetensors") as temporary:
                save_arrays(temporary, {"a": np.zeros(1 << 16, np.float32)}, "cache")

        def exporting() -> None:
            with whole_folder(tmp_path / "student") as folder:
                save_arrays(folder / "x.safetensors", {"a": np.zeros(1 << 16, np.float32)}, "cache")

        for write in (writing, exporting):
            with pytest.raises(
                RunError, match=r"cannot be written: .*o space left .*check the folder and the free space"
            ):
                write()
            assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("offsets", ["[0]", "[]", "null", '{"0": 1}', '["a", "b"]'])
def test_a_header_of_another_form_is_named(tmp_path: Path, offsets: str) -> None:
    header = f'{{"x": {{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}}}'.encode()
    path = tmp_path / "shard.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert damage(path, "any")
    with pytest.raises(ValueError, match=r"not a safetensors file|cut short"):
        mapped(path)
