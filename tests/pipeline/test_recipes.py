"""The recipes that come with lead-ds: each plans all of its stages; LEAD's have the published settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.errors import InputError
from lead_ds.pipeline.recipe import Recipe
from lead_ds.pipeline.run import run_pipeline
from tests.helpers.launch import ROOT
from tests.helpers.rooms import settings

RECIPES = sorted((ROOT / "ds_configs" / "recipes").glob("*.yaml"))

# The paper's scripts: the teacher's family, layers of teacher and student, lr, steps and accumulation of the
# distillation; lr and accumulation of the teacher's warm-up.
PUBLISHED = {
    "lead_12de_to_6de": ("dual_encoder", 5e-5, 50_000, 1, 2e-5, 1),
    "lead_12cb_to_6de": ("colbert", 2e-5, 50_000, 1, 2e-5, 1),
    "lead_12ce_to_6de": ("cross_encoder", 5e-5, 100_000, 10, 1e-5, 10),
    "lead_24cb_to_12de": ("colbert", 2e-5, 50_000, 1, 1e-5, 1),
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes name DeepSpeed's files from there


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_plans_all_of_its_stages(path: Path, tmp_path: Path) -> None:
    told: list[str] = []
    output = tmp_path / "out"
    tree = run_pipeline(path, [f"output={output}"], dry_run=True, tell=told.append, launcher="none")
    families = {one["stage"].split("-")[0] for one in tree["stages"]}
    assert {"distill", "encode", "index", "search", "evaluate"} <= families
    if path.stem in PUBLISHED:
        assert {"first", "mine"} <= families
    assert {one["state"] for one in tree["stages"]} == {"to do"}
    for one in tree["stages"]:
        for command in one["commands"]:
            assert command in told[0]
    assert not output.exists()


def test_every_published_pair_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} >= PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_settings(name: str) -> None:
    kind, lr, steps, accumulation, warm_lr, warm_accumulation = PUBLISHED[name]
    path = ROOT / "ds_configs" / "recipes" / f"{name}.yaml"
    config = load_config(path)
    assert config.teacher is not None
    assert (config.teacher.kind, config.teacher.train) == (kind, True)
    train, layer = config.train, config.losses.layer
    assert (train.lr, train.steps, train.accumulation, train.warmup_ratio, train.clip) == (
        lr,
        steps,
        accumulation,
        0.1,
        2,
    )
    assert (layer.select, layer.k, layer.every, layer.layer_temperature, layer.reweight) == ("random", 5, 10, 10, True)
    temperatures = [layer.teacher_temperature, layer.student_temperature, config.losses.contrastive.temperature]
    temperatures += [config.losses.response.teacher_temperature, config.losses.response.student_temperature]
    assert temperatures == [1.0] * 5
    assert [getattr(config.losses, part).weight for part in ("contrastive", "response", "layer")] == [1.0] * 3
    assert (config.student.query_length, config.student.passage_length, config.seed) == (32, 128, 888)
    recipe = Recipe(path, [])
    assert "--num_gpus 8" in recipe.pipeline.launcher
    assert recipe.pipeline.mine is not None
    assert recipe.pipeline.mine.number == 100
    overrides = {stage: recipe.stages[stage].commands[0] for stage in ("first", "teacher", "student")}
    for stage, command in overrides.items():
        warm = load_config(path, [word for word in command if "=" in word])
        assert warm.train.steps == 20_000
        expected = (warm_lr, warm_accumulation) if stage == "teacher" else (2e-5, 1)
        assert (warm.train.lr, warm.train.accumulation) == expected
    graded = {item.split: item.relevance_level for item in recipe.pipeline.evaluate}
    assert graded == {"dev.small": 1, "dl19": 2, "dl20": 2}


def test_a_warm_up_that_recipes_share_is_the_same_stage() -> None:
    recipes = [Recipe(ROOT / "ds_configs" / "recipes" / f"{name}.yaml", ["output=runs/lead"]) for name in PUBLISHED]
    assert len({recipe.stages["mine"].folder for recipe in recipes}) == 1
    assert len({recipe.stages["student"].folder for recipe in recipes[:3]}) == 1
    assert len({recipe.stages["distill"].folder for recipe in recipes}) == len(recipes)


def test_the_decoder_is_asked_as_it_was_trained() -> None:
    teacher = load_config(ROOT / "ds_configs" / "recipes" / "decoder_reranker_to_minilm.yaml").teacher
    assert teacher is not None
    assert teacher.template == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert (teacher.yes_token, teacher.no_token) == ("yes", "no")


def test_the_student_searches_what_its_teacher_encoded(rooms: Path, tmp_path: Path) -> None:
    tree = settings(
        rooms, tmp_path / "out", pipeline={"mine": None, "documents": "teacher", "evaluate": [{"split": "test"}]}
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    planned = run_pipeline(path, [], dry_run=True, tell=lambda _: None, launcher="none")
    commands = {one["stage"]: one["commands"][0] for one in planned["stages"]}
    assert f"--model {rooms / 'llama'}" in commands["encode"]
    assert "distill" in commands["search-test"].split("--query-model ")[1].split()[0]
    assert f"--document-model {rooms / 'llama'}" in commands["search-test"]
    with pytest.raises(InputError, match="the teacher gives no vectors"):
        run_pipeline(path, ["teacher.kind=colbert"], dry_run=True, tell=lambda _: None, launcher="none")
