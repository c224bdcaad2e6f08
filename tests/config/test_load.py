"""Configuration: overrides, and errors that name the place and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lead_ds.config import load_config, save_config
from lead_ds.errors import InputError

BASE = """
teacher: {kind: dual_encoder, path: t}
student: {path: s}
data: {path: d}
"""


def write(folder: Path, text: str = BASE) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert (config.seed, config.train.steps, config.train.lr, config.train.clip) == (888, 50_000, 5e-5, 2.0)
    layer = config.losses.layer
    assert (layer.select, layer.k, layer.every, layer.layer_temperature, layer.reweight) == (
        "random",
        5,
        10,
        10.0,
        True,
    )


def test_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path),
        ["train.lr=2e-5", "losses.layer.reweight=false", "student.layers=[0, 2]", "evaluation.split=null"],
    )
    assert config.train.lr == 2e-5
    assert config.losses.layer.reweight is False
    assert config.student.layers == [0, 2]
    assert config.evaluation.split is None


def test_the_home_folder_in_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pipeline = "pipeline={mine: {model: ~/m}, prepare: [{kind: beir, src: ~/zip}], evaluate: [{data: ~/other}]}"
    config = load_config(
        write(tmp_path),
        [pipeline, "data.path=~/data", "teacher.lens=tuned", "teacher.lens_path=~/lens", "output=~/out"],
    )
    stages = config.pipeline
    assert stages is not None
    assert stages.mine is not None
    assert stages.mine.model == str(tmp_path / "m")
    assert stages.prepare[0].src == str(tmp_path / "zip")
    assert stages.evaluate[0].data == str(tmp_path / "other")
    assert config.data.path == str(tmp_path / "data")
    assert config.lens_folder == tmp_path / "lens"
    assert config.output == str(tmp_path / "out")


def test_saved_configuration_is_read_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["train.lr=3e-5", "losses.layer.k=2"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "place", "says"),
    [
        (["train.stepz=5"], "train.stepz", "did you mean 'steps'"),
        (["losses.layer.layer_temprature=5"], "losses.layer.layer_temprature", "did you mean 'layer_temperature'"),
        (["teacher.plcement=zero3"], "teacher.plcement", "did you mean 'placement'"),
        (["studnt.path=x"], "studnt", "did you mean 'student'"),
        (["train.lr=-1"], "train.lr", "greater than 0"),
        (["train.warmup_ratio=1.5"], "train.warmup_ratio", "less than or equal to 1"),
        (["losses.layer.select=best"], "losses.layer.select", "'random'"),
        (["losses.contrastive.weight=nan"], "losses.contrastive.weight", "finite"),
        (["teacher=null"], "teacher", "teacher section is missing"),
        (["losses.layer.select=given"], "losses.layer", "teacher_layers and student_layers"),
        (["losses.layer={select: given, teacher_layers: [], student_layers: []}"], "teacher_layers", "at least 1"),
        (["losses.attention.select=given"], "losses.attention", "teacher_layers and student_layers"),
        (["losses.attention={teacher_layers: [1], student_layers: [0]}"], "losses.attention", "select: given"),
        (["losses.attention={heads: pair, relation_heads: 2}"], "losses.attention", "heads: relation"),
        (["losses.attention={form: interaction, heads: mean}"], "losses.attention", "heads: relation"),
        (["teacher={kind: cross_encoder, path: x, train: true, placement: zero3}"], "teacher", "student's engine"),
        (["student.layers=[0, 1, 1]"], "student.layers", "twice"),
        (["seed=20240101120000"], "seed", "less than 4294967296"),
        (["teacher.offload=nvme"], "teacher", "offload_path"),
        (["nonsense"], "nonsense", "section.key=value"),
        (["train.steps.deeper=1", "train.steps=5"], "train.steps", "valid integer"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, overrides: list[str], place: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path), overrides[:1])
    assert place in caught.value.where
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2


@pytest.mark.parametrize("kind", ["cross_encoder", "llm_reranker"])
def test_a_teacher_of_pairs_needs_negatives(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=r"data\.negatives: is 0"):
        load_config(write(tmp_path), [f"teacher.kind={kind}", "data.negatives=0"])
    assert load_config(write(tmp_path), ["data.negatives=0"]).data.negatives == 0  # others compare over the batch


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 more such error"):
        load_config(write(tmp_path), ["train.stepz=5", "train.lrr=5"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "does not hold a configuration"),
        ("student: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_config(write(tmp_path, text))
    with pytest.raises(InputError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_config(tmp_path)
