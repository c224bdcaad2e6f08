"""Formats are read as their reference reads them, or refused: a few here, all by `python -m tests.formats`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.formats import FORMATS
from tests.formats.measure import equal, measured

SAMPLE = (
    "cls, max and mean pooling together",
    "INSTRUCTOR: weightedmean without the prompt",
    "sentence-t5, gtr: T5 encoder, mean, Dense",
    "StaticEmbedding, Dense, unit length, prompts",
    "model2vec: with its weights and mapping",
    "the transformer in 0_Transformer",
    "PyLate: expansion as it is by default",
    "code of its own that gives a dictionary",
    "code of its own beside a native architecture",
    "cross-encoder: a default prompt",
    "vision and language in one",
    "SPLADE: maximum, prompts",
    "SPLADE: sum, log twice, of DistilBERT, as version 5 names it",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_format_is_read_as_its_reference_reads_it_or_refused(tmp_path: Path, name: str) -> None:
    found = measured(FORMATS[name], tmp_path / "m")
    assert all(map(equal, found.values())), found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in SAMPLE])
def test_every_other_format(tmp_path: Path, name: str) -> None:
    test_a_format_is_read_as_its_reference_reads_it_or_refused(tmp_path, name)


def test_the_page_has_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text("utf-8")
    assert [name for name in FORMATS if f"| {name} |" not in page] == [], "run `python -m tests.formats`"
