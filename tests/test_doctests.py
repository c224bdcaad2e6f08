"""Examples in docstrings run. Those of models find tiny ones of a kind under its name, and an empty `folder`."""

from __future__ import annotations

import doctest
import importlib
import os
from pathlib import Path
from typing import Any

import pytest

import lead_ds
from lead_ds.losses import LOSSES, Loss, LossShape, Views
from lead_ds.relevance import Relevance, ScoreFeatures, TokenFeatures, VectorFeatures
from tests.test_floors import files, module_of

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(f"lead_ds.{module_of(path)}" for path in files() if ">>> " in path.read_text("utf-8"))


def examples_of(module: Any, **names: Any) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of(module: str, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"dual_encoder": str(rooms / "student"), "cross_encoder": str(rooms / "cross"), "folder": tmp_path}
    tests = examples_of(importlib.import_module(module), **names)
    assert tests, "an example that nothing runs"
    environment = set(os.environ)
    for test in tests:
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        told: list[str] = []
        runner.run(test, out=told.append)
        assert not runner.summarize(verbose=False).failed, "".join(told)
    assert not {"RANK", "WORLD_SIZE"} & (set(os.environ) - environment)


def test_public_names_have_an_example() -> None:
    face = [getattr(lead_ds, name) for name in set(lead_ds.__all__) - {"losses"}]
    seen = [Relevance, VectorFeatures, TokenFeatures, ScoreFeatures, Loss, LossShape, Views]
    for public in (*face, *seen, *(LOSSES[name] for name in LOSSES)):
        assert ">>> " in (public.__doc__ or ""), public
