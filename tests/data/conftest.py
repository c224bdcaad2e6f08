"""Tiny data on disk, and tokenizers trained once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lead_ds.config import Config, StudentConfig, TeacherConfig
from lead_ds.settings.data import DataConfig
from lead_ds.settings.train import TrainConfig
from tests.helpers.tiny import tiny_dataset, tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAD_DS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A canonical dataset: 60 passages, 30 queries, 18 of them for training."""
    return tiny_dataset(tmp_path / "data", scores=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The directory of a tiny tokenizer of a kind."""
    root = tmp_path_factory.mktemp("tokenizers")

    def make(kind: str = "wordpiece") -> str:
        path = root / kind
        return str(path if path.exists() else tiny_tokenizer(path, kind))

    return make


@pytest.fixture
def config(folder: Path, tokenizer: Callable[..., str]) -> Callable[..., Config]:
    """A run over the tiny dataset with a dual-encoder student and a cross-encoder teacher."""

    def make(*, negatives: int = 3, workers: int = 0, teacher: dict | None = None, **train: int) -> Config:
        read = {"path": tokenizer(), "kind": "cross_encoder"} | (teacher or {})
        if read["kind"] == "cross_encoder":
            read = {"max_length": 48} | read
        return Config(
            seed=7,
            student=StudentConfig(path=tokenizer(), query_length=12, passage_length=24),
            teacher=TeacherConfig(**read),
            data=DataConfig(path=str(folder), negatives=negatives, workers=workers),
            train=TrainConfig(**({"batch_size": 2, "accumulation": 2} | train)),
        )

    return make
