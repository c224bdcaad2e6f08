"""What a setting means is written at its field, and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lead_ds.config import Config, load_config
from lead_ds.engine.distributed.agreement import facts
from lead_ds.engine.training.resume import changed_keys
from lead_ds.pipeline.settings import deciding
from lead_ds.settings.base import Meaning
from lead_ds.settings.meaning import means
from lead_ds.teachers.identity import deciding_settings
from tests.config.test_load import write

# A setting of each meaning, with another value: at the run, at its teacher, in a section that has a meaning as a whole.
CHANGED: list[tuple[str, Meaning]] = [
    ("teacher.path=elsewhere", "place"),
    ("student.path=elsewhere", "place"),
    ("deepspeed.student=ds_configs/student_zero2.json", "place"),
    ("evaluation.path=elsewhere", "place"),
    ("train.log_every=3", "pace"),
    ("teacher.placement=zero3", "pace"),
    ("monitor.csv=false", "pace"),
    ("profile=true", "pace"),
    ("kernels=torch", "bits"),
    ("teacher.batch_size=3", "bits"),
    ("student.passes=2", "bits"),
    ("train.lr=0.1", "result"),
    ("teacher.query_length=5", "result"),
    ("losses.layer.k=2", "result"),
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write(tmp_path))


@pytest.mark.parametrize(("override", "meaning"), CHANGED)
def test_all_that_compare_two_runs_go_by_the_field(tmp_path: Path, config: Config, override: str, meaning: str) -> None:
    key = override.partition("=")[0]
    other = load_config(write(tmp_path), [override])
    assert means(other)[key].meaning == meaning
    # A run is resumed bit for bit; a stage is not made again for other last bits; ranks may name places as they like.
    assert (changed_keys(config, other) == []) == (meaning in ("place", "pace"))
    files = key.startswith("deepspeed.")  # compared by content, which here is another one
    assert (deciding(config) == deciding(other)) == (meaning in ("place", "pace", "bits") and not files)
    assert (facts(config) == facts(other)) == (meaning == "place" and not files)
    assert config.teacher is not None
    assert other.teacher is not None
    read = key.startswith("teacher.")
    assert (deciding_settings(config.teacher) == deciding_settings(other.teacher)) == (
        not read or meaning in ("place", "pace", "bits")
    )


def test_what_all_write_to_must_be_named_alike(tmp_path: Path, config: Config) -> None:
    assert facts(config) != facts(load_config(write(tmp_path), ["output=elsewhere"]))


def test_how_a_teacher_is_trained_is_not_what_it_says(tmp_path: Path, config: Config) -> None:
    other = load_config(write(tmp_path), ["teacher.train=true", "teacher.lr=0.1"])
    assert config.teacher is not None
    assert other.teacher is not None
    assert deciding_settings(config.teacher) == deciding_settings(other.teacher)
    assert changed_keys(config, other) == ["teacher.lr", "teacher.train"]


def test_no_list_of_keys_is_kept_by_hand(config: Config) -> None:
    """No collection of dotted keys stands in the code that compares runs."""
    root = Path(__file__).parents[2] / "lead_ds"
    known = {key for key in means(config) if "." in key}
    lists = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Set, ast.List, ast.Tuple)):
                named = [item.value for item in node.elts if isinstance(item, ast.Constant) and item.value in known]
                if len(named) > 2:
                    lists.append(f"{path.relative_to(root)}:{node.lineno}: {named}")
    assert not lists
