"""Windows put together from kept tokens equal those that a tokenizer makes; what is missing or stale is made, the rest kept."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.config import Config
from lead_ds.data.batches import Batches
from lead_ds.data.groups.open import open_groups
from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens import cache as token_cache
from lead_ds.data.tokens.cache import TokenCache
from lead_ds.data.tokens.pairs import PairForm, longest_first
from lead_ds.errors import InputError, RunError
from lead_ds.models.load import load_text
from tests.helpers.batches import ALONE, windows_of
from tests.helpers.tiny import TokenizerKind, tiny_dataset, tiny_tokenizer, write_jsonl

KINDS: tuple[TokenizerKind, ...] = ("wordpiece", "unigram", "bpe")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        (tiny_tokenizer(root / kind, kind) / "config.json").write_text('{"model_type": "bert"}')
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "SHARD", 16)
    monkeypatch.setattr(token_cache, "BLOCK", 5)


def config_of(data: Path, cache: bool | str, teacher: dict[str, Any], student: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "teacher": teacher,
            "student": student,
            "data": {"path": str(data), "negatives": 3, "token_cache": cache},
            "train": {"batch_size": 2, "accumulation": 2},
        }
    )


def batches_of(config: Config) -> Batches:
    return windows_of(config, ALONE)


def assert_equal(ours: list[ModelBatch], theirs: list[ModelBatch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("queries", "passages", "pairs"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            if x is not None:
                assert x.keys() == y.keys()
                assert all(torch.equal(x[key], y[key]) for key in x), name


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_the_tokenizers(tokenizers: Path, tmp_path: Path, kind: str) -> None:
    data, path = tiny_dataset(tmp_path / "data"), str(tokenizers / kind)
    student = {"path": path, "query_length": 7, "passage_length": 11, "query_prompt": "query: "}
    teachers = [
        {"kind": "dual_encoder", "path": path, "passage_prompt": "passage: "},
        {"kind": "dual_encoder", "path": path, "pooling": "last"},
        {"kind": "colbert", "path": path, "mask_punctuation": True, "query_expansion": kind == "wordpiece"},
        *({"kind": "cross_encoder", "path": path, "max_length": n, "query_prompt": "q "} for n in (12, 13, 200)),
        {"kind": "llm_reranker", "path": path, "max_length": 60, "template": "plain"},
    ]
    for teacher in teachers:
        kept = batches_of(config_of(data, str(tmp_path / "kept"), teacher, student))
        plain = batches_of(config_of(data, False, teacher, student))
        assert (kept.teachers["teacher"].tokens is not None) == (teacher["kind"] != "llm_reranker")
        kept = pickle.loads(pickle.dumps(kept))  # as a data-loader worker gets it
        for step in range(plain.steps_per_epoch):
            ours, theirs = kept.window(step), plain.window(step)
            assert_equal(ours.student, theirs.student)
            assert_equal(ours.teachers[0], theirs.teachers[0])
            assert ours.query_ids == theirs.query_ids


def test_what_is_there_is_kept_and_what_is_not_is_made(
    tokenizers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, path = tiny_dataset(tmp_path / "data"), str(tokenizers / "wordpiece")
    teacher = {"kind": "dual_encoder", "path": path}
    config = config_of(data, str(tmp_path / "kept"), teacher, {"path": path})
    batches_of(config)
    assert "corpus.jsonl" in capsys.readouterr().err
    shards = sorted((tmp_path / "kept").glob("*-corpus-*/*.idx"))
    assert len(shards) == 4  # of 60 passages; both models read alike and share them
    times = [shard.stat().st_mtime_ns for shard in shards]
    batches_of(config)
    assert capsys.readouterr().err == ""
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])  # cut, as by a full disk
    batches = batches_of(config)
    changed = [shard.stat().st_mtime_ns != time for shard, time in zip(shards, times, strict=True)]
    assert changed == [False, True, True, False]
    plain = batches_of(config_of(data, False, teacher, {"path": path}))
    assert_equal(batches.window(0).student, plain.window(0).student)

    corpus = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    write_jsonl(data / "corpus.jsonl", [record | {"text": "another text " + record["text"]} for record in corpus])
    ours, theirs = (batches_of(config_of(data, c, teacher, {"path": path})) for c in (str(tmp_path / "kept"), False))
    assert_equal(ours.window(0).teachers[0], theirs.window(0).teachers[0])


def test_what_cannot_be_kept_is_told(tokenizers: Path, tmp_path: Path) -> None:
    data, path = tiny_dataset(tmp_path / "data"), str(tokenizers / "wordpiece")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"name another folder with data\.token_cache"):
        batches_of(config_of(data, str(tmp_path / "file"), {"kind": "dual_encoder", "path": path}, {"path": path}))
    record = {"query": "a", "pos": ["b"], "neg": ["c", "d", "e"]}
    write_jsonl(data / "train.jsonl", [record | {"query": f"a {i}"} for i in range(8)])
    with pytest.raises(InputError, match="carry their texts"):
        batches_of(config_of(data, True, {"kind": "dual_encoder", "path": path}, {"path": path}))


def test_pairs_of_a_tokenizer_that_makes_them_otherwise_are_not_joined(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = tiny_dataset(tmp_path / "data"), str(tokenizers / "wordpiece")
    config = config_of(data, False, {"kind": "cross_encoder", "path": path, "max_length": 14}, {"path": path})
    assert config.teacher is not None
    encoder, groups = load_text(config.teacher), open_groups(config.data)
    assert TokenCache.open(str(tmp_path / "kept"), groups, encoder, rank=0) is not None
    encoder.tokenizer.truncation_side = "left"  # cuts the beginning of a text
    assert TokenCache.open(str(tmp_path / "kept"), groups, encoder, rank=0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_longest_first_is_the_tokenizers(tokenizers: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(["bread"] * int(n)) for n in rng.integers(1, 40, 200)]
    for room in (6, 7, 12, 25):
        settings = {"kind": "cross_encoder", "path": str(tokenizers / kind), "max_length": room}
        tree = config_of(Path("-"), False, settings, {"path": "-"})
        assert tree.teacher is not None
        encoder = load_text(tree.teacher)
        assert PairForm.of(encoder, list(zip(texts[::2], texts[1::2], strict=True))) is not None, room
    assert longest_first(3, 9, 8) == (3, 5)
