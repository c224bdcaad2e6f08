"""A teacher made of the training file's own scores gives the losses of the model whose scores they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lead_ds.config import load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.taught.relevance import RelevanceCache
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError
from tests.engine.test_teach import write
from tests.helpers.launch import launch
from tests.helpers.rooms import settings
from tests.helpers.tiny import write_jsonl

TRAIN = {"batch_size": 2, "accumulation": 2, "steps": 5, "save_every": 2, "lr": 1e-3}
LOSSES = {
    "layer": {"weight": 0.0},
    "response": {"weight": 1.0, "teacher_temperature": 2.0},
    "margin_mse": {"weight": 0.1},
    "contrastive": {"scope": "group"},  # otherwise a process sees other passages when there are more
}


def scored_lines(data: Path, cache: RelevanceCache) -> list[dict[str, Any]]:
    """The training lines, with a cached teacher's final relevance as scores."""
    corpus = Dataset.open(data).corpus
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for row, line in enumerate(lines):
        names = list(dict.fromkeys([*line["positives"], *line["negatives"]]))
        said = cache.relevance([row], [corpus.rows(names)])[0, :, -1]
        line["scores"] = dict(zip(names, said.astype(float).tolist(), strict=True))
    return lines


@pytest.fixture(scope="module")
def trained(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses of a cached cross-encoder, and of its scores: alone, on two processes, and resumed."""
    folder = tmp_path_factory.mktemp("scores")
    extra = {"scale": "standard"}
    found: dict[str, Any] = {"folder": folder}
    tree = settings(rooms, folder / "teach", "cross_encoder", extra, losses=LOSSES, train=TRAIN)
    [[_]] = launch("tests.engine.jobs:teach_each", 1, configs=[write(folder / "teach.yaml", tree)])
    cache = RelevanceCache.open(folder / "teach" / "cache")
    data = Path(tree["data"]["path"])
    name = "scored.jsonl"
    write_jsonl(data / name, scored_lines(data, cache))
    kept = {**tree, "data": {**tree["data"], "train": name}}
    cached = {**tree, "teacher": {"kind": "cached", "path": str(cache.folder)}, "output": str(folder / "cached")}
    scores = {**kept, "teacher": {"kind": "scores", **extra}, "output": str(folder / "scores")}
    paths = [write(folder / "cached.yaml", cached), write(folder / "scores.yaml", scores)]
    [[found["cached"], found["scores"]]] = launch("tests.engine.jobs:distil_each", 1, configs=paths)
    both = {**scores, "output": str(folder / "both"), "train": {**TRAIN, "batch_size": 1}}
    [[found["both"]], _] = launch("tests.engine.jobs:distil_each", 2, configs=[write(folder / "both.yaml", both)])
    [found["continued"]] = launch("tests.engine.jobs:continued", 1, path=paths[1], other_lens=False)
    found["tree"] = scores
    return found


def test_scores_of_a_model_give_its_losses(trained: dict[str, Any]) -> None:
    assert len(set(trained["scores"])) == TRAIN["steps"], trained["scores"]
    np.testing.assert_allclose(trained["scores"], trained["cached"], rtol=1e-5)


def test_two_processes_and_a_resumed_run_lose_nothing(trained: dict[str, Any]) -> None:
    np.testing.assert_allclose(trained["both"], trained["scores"], rtol=1e-5)
    assert trained["continued"] == trained["scores"]


def test_the_run_and_its_student_name_the_file(trained: dict[str, Any]) -> None:
    run = trained["folder"] / "scores"
    teacher = json.loads((run / "run.json").read_text())["teacher"]
    assert (teacher["placement"], Path(teacher["path"]).name) == ("scores", "scored.jsonl")
    assert "from `scored.jsonl` (scores)" in (run / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["losses.layer.weight=1"], r"losses\.layer\.weight: a teacher of kind scores has no layers .*set it to 0"),
        (["losses.attention.weight=1"], r"losses\.attention\.weight: a teacher of kind scores has no attention maps"),
        (["data.train=train.jsonl"], r"holds no scores"),
        (["data.negatives=20"], r"scored\.jsonl:1: \d+ negatives have a score, 20 are drawn"),
        (["data.negatives=0"], r"data\.negatives"),
        (["teacher.scale=cosine"], "cosine"),
        (["teacher.placement=zero3"], "placement"),
    ],
)
def test_what_scores_cannot_give_is_refused(
    trained: dict[str, Any], tmp_path: Path, overrides: list[str], told: str
) -> None:
    path = write(tmp_path / "run.yaml", {**trained["tree"], "output": str(tmp_path / "run")})
    with pytest.raises(InputError, match=told):
        distill(load_config(path, overrides), quiet=True)
    assert not (tmp_path / "run").exists()
