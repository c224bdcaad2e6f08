"""No input makes a reader do anything but read it or say, in one line, why not."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.inputs import inputs_of
from tests.fuzz.readers import READERS, Reader, feed

EXAMPLES = 2000 // len(READERS)
LONGEST = 10.0  # seconds for one input


def check(reader: Reader, content: bytes) -> None:
    """Feed one input; nothing may be written outside its folder, nor take long."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "a" / "b" / "own"
        folder.mkdir(parents=True)
        started = time.monotonic()
        feed(reader, content, folder)
        assert time.monotonic() - started < LONGEST
        outside = [path for path in Path(outer).rglob("*") if folder not in (path, *path.parents) and path.is_file()]
        assert not outside
        assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".owner.json"))]


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    for number, seed in enumerate(reader.seeds):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "file").write_bytes(seed)
        reader.read(folder / "file")


@pytest.mark.parametrize("name", READERS)
def test_no_input_ends_in_a_traceback(name: str) -> None:
    reader = READERS[name]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(reader, data.draw(inputs_of(reader)))

    run()
