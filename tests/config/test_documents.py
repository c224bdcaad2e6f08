"""Strict YAML and JSON: nothing vanishes, nothing means another thing than it looks like, nothing grows without end."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config
from lead_ds.errors import InputError
from lead_ds.settings.documents import read_json, read_yaml, write_yaml
from tests.config.test_load import BASE, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("On", "On"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0100", 100),
        ("0o14", 12),
        ("0x1F", 31),
        ("5e-5", 5e-5),
        ("5E3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-7", -7),
        (".inf", float("inf")),
        ("~", None),
        ("", None),
        ("null", None),
        ("TRUE", True),
        ("false", False),
        ("'5'", "5"),
        ("nan", "nan"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = read_yaml(f"a: {text}\n", "x")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("train: {lr: 1}\nseed: 1\ntrain: {steps: 1}\n", "x:3", "'train' is given twice, first in line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "x:4", "'b' is given twice, first in line 2"),
        ("a: {b: 1, b: 2}\n", "x:1", "'b' is given twice, first in line 1"),
        ("'a': 1\na: 2\n", "x:2", "given twice"),
        ("? [a]\n: 1\n", "x:1", "a key is a list"),
        ("a: [\n", "x:2", "not valid YAML"),
        ("a: !!python/object:os.system {}", "x:1", "not valid YAML"),
        ("a: !!int word", "x", "not valid YAML"),
        ("a: 1\n---\nb: 1\n", "x", "not valid YAML"),
        ("a: \x07", "x", "not valid YAML"),
        ("a: &a [*a]\n", "x:1", "holds itself"),
        ("a: &a {b: *a}\n", "x:1", "holds itself"),
        ("[" * 5000, "x", "nested too deeply"),
        ("[" * 150 + "]" * 150, "x", "nested too deeply"),
        ("a: " + "x" * (1 << 22), "x", "longer than"),
    ],
)
def test_what_is_refused_names_its_line(text: str, place: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_yaml(text, "x")
    assert str(caught.value.where).startswith(place)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(120)  # 10^11 values would take days
def test_aliases_do_not_multiply_without_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(InputError, match="holds more than 100000 values"):
        read_yaml("\n".join(lines), "x")
    shared = read_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "x")
    assert shared == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_a_section_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "train: {lr: 1.0e-3}\nseed: 1\ntrain: {steps: 5}\n")
    with pytest.raises(InputError, match=r"run\.yaml:7: 'train' is given twice, first in line 5"):
        load_config(path)


def test_json_given_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n\t"zero_optimization": {"stage": 3},\n\t"fp16": {"enabled": true},\n\t"zero_optimization": {}\n}'
    )
    with pytest.raises(InputError, match=r"ds\.json:4: 'zero_optimization' is given twice, first in line 2"):
        read_deepspeed_config(str(path))


@pytest.mark.parametrize(
    "text", ["{", "[NaN]", "[1e999, Infinity]", "[" * 100_000, '{"a": 1, "a": 2}', '{"\x7f": 1, "\x7f": 2}']
)
def test_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        read_json(text, "x")


def plain_tree(rng: random.Random, depth: int = 3) -> Any:
    """A tree of JSON's types, its texts of any characters that JSON can hold."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 6:
        return {text_of(rng): plain_tree(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind == 5:
        return [plain_tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    return (None, rng.random() < 0.5, rng.randrange(-(10**9), 10**9), rng.gauss(0, 1e3), text_of(rng))[kind]


def text_of(rng: random.Random, alphabet: str = "") -> str:
    """Up to 12 characters: of the alphabet; else words that look like other types, or any characters."""
    if alphabet:
        return "".join(rng.choices(alphabet, k=rng.randrange(40)))
    if rng.random() < 0.5:
        return rng.choice(
            ["yes", "null", "~", "1", "1e5", " a ", "a: b", "#", "'", '"', "{", "[a]", "-", "true", "", "0x1", "- a"]
        )
    return "".join(
        chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        for _ in range(rng.randrange(12))
    )


def test_json_is_read_as_python_reads_it() -> None:
    for seed in range(500):
        tree = plain_tree(random.Random(seed))
        assert read_json(json.dumps(tree), "x") == tree


def test_what_is_saved_is_read_back() -> None:
    for seed in range(300):
        tree = {"a": plain_tree(random.Random(seed))}
        assert read_yaml(write_yaml(tree), "x") == yaml.safe_load(write_yaml(tree)) == tree


def test_no_document_ends_in_a_traceback() -> None:
    for seed in range(2000):
        text = text_of(random.Random(seed), "ab:-[]{}&*,\"' \n#!|>%@`0?\t<")
        for read in (read_yaml, read_json):
            with contextlib.suppress(InputError):
                read(text, "x")
