"""A shard that lacks an array, or holds one of another shape, is refused by name, also where checksums are not compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lead_ds.errors import RunError
from lead_ds.io import shards
from tests.fuzz import made

RELEVANCE = ("starts", "keys", "deviation", "mean")
FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path, bool], None], tuple[str, ...]]] = {
    "relevance-00000": (made.taught, made.taught_read, RELEVANCE),
    "index": (made.taught_as_vectors, made.taught_as_vectors_read, ("queries", "passages")),
    "queries-00000": (made.taught_as_vectors, made.taught_as_vectors_read, ("deviation", "mean")),
    "passages-00000": (made.taught_as_vectors, made.taught_as_vectors_read, ("deviation", "mean")),
}


@pytest.mark.parametrize(("name", "array"), [(name, array) for name, (*_, arrays) in FILES.items() for array in arrays])
def test_an_array_that_is_missing_or_of_another_shape(name: str, array: str, tmp_path: Path) -> None:
    make, read, _ = FILES[name]
    make(tmp_path)
    path = tmp_path / f"{name}.safetensors"
    good = {key: np.array(value) for key, value in shards.mapped(path)[0].items()}
    read(tmp_path, False)
    changed: list[dict[str, Any]] = [{key: value for key, value in good.items() if key != array}]
    changed.append(good | {array: good[array][:-1]})
    for arrays in changed:
        shards.save_arrays(path, arrays, "another")
        with pytest.raises(RunError, match=rf"{name}\.safetensors: (is damaged|cannot be read)"):
            read(tmp_path, False)


def test_rows_beyond_the_shards_are_refused(tmp_path: Path) -> None:
    made.taught_as_vectors(tmp_path)
    path = tmp_path / "index.safetensors"
    good = {key: np.array(value) for key, value in shards.mapped(path)[0].items()}
    for row in (-1, 9):
        shards.save_arrays(path, good | {"queries": np.array([row])}, "another")
        with pytest.raises(RunError, match="names rows that no shard has"):
            made.taught_as_vectors_read(tmp_path, False)
