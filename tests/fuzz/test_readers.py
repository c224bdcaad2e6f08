"""No input makes a reader do anything but read it or say, in one line, why not."""

from __future__ import annotations

import json
from typing import Any

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


GONE = object()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("vector cache: manifest.json", "queries", 10**31),
        ("vector cache: manifest.json", "passages", 10**18),
        ("teacher cache: manifest.json", "facts.data.groups", 10**31),
        ("vectors: manifest.json", "count", 10**18),
        ("vectors: manifest.json", "model", GONE),
        ("metrics", "lr", []),
        ("metrics", "step", 10**400),
        ("metrics", "layers.teacher", [0, 10**9]),
        ("metrics", "layers.weights", [0.5, "x"]),
        ("stage record", "outputs.\0", {}),
        ("owner record", "pid", 10**18),
        ("stage record", "outputs.out", "\ud800"),
        ("stage record", "outputs.\ud800", "x"),
        ("index: index.json", "model", GONE),
        ("index: index.json", "model", []),
        ("index: index.json", "dimension", []),
        ("index: index.json", "count", 10**31),
        ("model: config_sentence_transformers.json", "prompts.query", [None]),
        ("model: sentence_bert_config.json", "max_seq_length", []),
        ("model: lead_ds.json", "passage_length", {}),
        ("model: lead_ds.json", "passage_length", None),
        ("model: config.json", "use_cache", {}),
        ("model: config.json", "vocab_size", -778),
        ("model: config.json", "dtype", "floatat32"),
    ],
)
def test_what_once_broke_a_reader(name: str, key: str, value: Any) -> None:
    reader = READERS[name]
    first, line, rest = reader.seeds[0].partition(b"\n" if name == "metrics" else b"\0")
    tree = within = json.loads(first)
    *path, last = key.split(".")
    for part in path:
        within = within[part]
    if value is GONE:
        del within[last]
    else:
        within[last] = value
    assert check(reader, json.dumps(tree).encode() + line + rest) == (
        name in ("stage record", "owner record") or value is None
    )


@pytest.mark.parametrize(("key", "value"), [("name", "1"), ("path", "x" * 5000)])
def test_a_module_that_cannot_be(key: str, value: str) -> None:
    reader = READERS["model: modules.json"]
    tree = json.loads(reader.seeds[0])
    tree[0][key] = value
    assert not check(reader, json.dumps(tree).encode())


def test_a_file_that_holds_null_is_not_an_absent_one() -> None:
    for name in ("modules.json", "lead_ds.json", "1_Pooling/config.json"):
        assert not check(READERS[f"model: {name}"], b"null")
