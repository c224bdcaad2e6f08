"""No input makes a reader do anything but read it or say, in one line, why not."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.check import check
from tests.fuzz.inputs import inputs_of
from tests.fuzz.readers import READERS

INPUTS = 2000
SHARES = sum(reader.share for reader in READERS.values())


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name: str) -> None:
    reader = READERS[name]
    for seed in reader.seeds:
        assert check(reader, seed)


@pytest.mark.parametrize("name", READERS)
def test_no_input_ends_in_a_traceback(name: str) -> None:
    reader = READERS[name]

    @settings(
        max_examples=max(2, int(INPUTS * reader.share / SHARES)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(reader, data.draw(inputs_of(reader)))

    run()
