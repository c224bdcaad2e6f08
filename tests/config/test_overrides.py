"""`key=value` is read by the type of its field, wherever it is taken."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lead_ds.config import Config, load_config
from lead_ds.errors import InputError
from lead_ds.retrieval.evaluate import open_encoder
from lead_ds.settings.documents import in_yaml
from lead_ds.settings.parse import apply_override, refuse_twice
from tests.config.test_documents import plain_tree, text_of
from tests.config.test_load import write


def value_of(override: str) -> Any:
    """What an override leaves in a tree."""
    tree: dict[str, Any] = {}
    apply_override(tree, override, Config)
    node: Any = tree
    for name in override.partition("=")[0].split("."):
        node = node[name]
    return node


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("teacher.yes_token=yes", "yes"),
        ("teacher.yes_token=1", "1"),
        ("teacher.yes_token= yes", " yes"),
        ('teacher.yes_token=" yes"', " yes"),
        ("teacher.yes_token=null", "null"),
        ("teacher.query_prompt=query: ", "query: "),
        ('teacher.query_prompt="query: "', "query: "),
        ("teacher.query_prompt='it''s'", "it's"),
        ('teacher.query_prompt="a\\nb"', "a\nb"),
        ('teacher.query_prompt="a" or "b"', '"a" or "b"'),
        ("teacher.query_prompt=null", None),
        ('teacher.query_prompt="null"', "null"),
        ("teacher.query_prompt=", ""),
        ("teacher.query_prompt=[CLS] ", "[CLS] "),
        ("teacher.query_prompt={x}: # 5", "{x}: # 5"),
        ("train.lr=1e-5", 1e-5),
        ("train.lr=.5", 0.5),
        ("train.lr=1", 1),
        ("seed=0100", 100),
        ("train.compile=true", True),
        ("train.compile=FALSE", False),
        ("train.grad_cache=null", None),
        ("train.grad_cache=", None),
        ("train.grad_cache=4", 4),
        ("student.passes=packed", "packed"),
        ("student.passes=2", 2),
        ("student.passes=null", None),
        ("student.layers=[0, 2]", [0, 2]),
        ("student.layers=null", None),
        ("student.normalize=false", False),
        ("student.path=1", "1"),
        ("student.path=2024-01-01", "2024-01-01"),
        ("data.token_cache=true", True),
        ("data.token_cache=yes-cache", "yes-cache"),
        ("data.path=a=b", "a=b"),
        ("evaluation.measures=[nDCG@10, 'RR@10']", ["nDCG@10", "RR@10"]),
        ("evaluation.split=no", "no"),
        ("teacher.offload=none", "none"),
        ("teacher=null", None),
        ("profile=true", True),
        ("teacher={yes_token: yes, no_token: 0, query_prompt: null, lr: 1e-5, train: true}",
         {"yes_token": "yes", "no_token": "0", "query_prompt": None, "lr": 1e-5, "train": True}),
        ("pipeline.first={student: {path: 7}, train: {lr: 1e-5}}", {"student": {"path": "7"}, "train": {"lr": 1e-5}}),
        ("pipeline.first.train.lr=1e-5", 1e-5),
        ("pipeline.first.student.query_prompt=query: ", "query: "),
        ("pipeline.evaluate=[{split: 2020, measures: [R@10]}]", [{"split": "2020", "measures": ["R@10"]}]),
        ("pipeline.evaluate=[]", []),
        ("deepspeed.student={zero_optimization: {stage: 2}, x: 1e-5}", {"zero_optimization": {"stage": 2}, "x": 1e-5}),
        ("deepspeed.student.zero_optimization.stage=2", 2),
        ("deepspeed.student=x.json", "x.json"),
    ],
)  # fmt: skip
def test_a_value_has_the_type_of_its_field(override: str, value: Any) -> None:
    found = value_of(override)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "override", ["student.layers=[0, 2", "teacher={kind: dual_encoder", "teacher={a: 1, a: 2}", "=1", "a..b=1"]
)
def test_what_cannot_be_read_is_refused(override: str) -> None:
    with pytest.raises(InputError):
        value_of(override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=many", "valid integer"),
        ("train.compile=maybe", "valid boolean"),
        ("student.layers=1", "valid list"),
        ("seed=1:30", "valid integer"),
        ("train.lr=fast", "valid number"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_config(write(tmp_path), [override])
    assert override.partition("=")[0] in caught.value.where


def test_a_pipeline_hands_texts_on_unchanged() -> None:
    for seed in range(500):
        text = text_of(random.Random(seed))
        for key in ("teacher.yes_token", "teacher.query_prompt", "data.path", "evaluation.split"):
            assert value_of(f"{key}={in_yaml(text)}") == text


def test_a_pipeline_hands_other_values_on_unchanged() -> None:
    for seed in range(300):
        value = plain_tree(random.Random(seed))
        assert value_of(f"deepspeed.student.any={in_yaml(value)}") == value


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.lr=1e-3", "train.lr=2e-3"],
        ["train.lr=1e-3", "seed=1", " train . lr=1e-3"],
        ["train.lr=1e-3", "train={steps: 3}"],
        ["teachers.0.path=a", "teachers=[{path: b}]"],
    ],
)
def test_what_is_given_twice_is_refused(overrides: list[str]) -> None:
    with pytest.raises(InputError, match=r"takes away 't.*, which was given before it"):
        refuse_twice(overrides)


def test_a_part_of_what_was_given_is_no_second_time() -> None:
    refuse_twice(["train={steps: 3}", "train.lr=1e-3", "train.lr_floor=1", "teachers.0.path=a", "teachers.01.path=b"])


def test_an_option_and_a_setting_are_the_same_thing_twice() -> None:
    with pytest.raises(InputError, match="takes away 'dim=2'"):
        open_encoder("m", dim=4, settings=["dim=2"])
