"""Several teachers in real runs: of two architectures and a file's scores, one sharded; on one process and two; resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.engine.distributed.agreement import facts
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.training.distill import distill, open_inputs, settled
from lead_ds.errors import InputError
from lead_ds.plan.placement import Cluster, make_plan
from lead_ds.plan.requirements import requirements
from lead_ds.report import write_report
from tests.engine.jobs import losses_of
from tests.engine.running import copy_run
from tests.helpers.launch import launch
from tests.helpers.rooms import TEACHERS, settings
from tests.helpers.tiny import write_jsonl

JOB = "tests.engine.jobs:distil_each"
LOSSES = {
    "contrastive": {"weight": 0.0},
    "response": {"weight": 1.0},
    "layer": {"weight": 1.0, "k": 2, "every": 2},
    "embedding": {"weight": 1.0},
}
TRAIN = {"steps": 4, "batch_size": 4, "save_every": 2}


def scored(rooms: Path) -> str:
    """Training groups whose passages have a score; the file's name."""
    lines = [json.loads(line) for line in (rooms / "data" / "train.jsonl").read_text().splitlines()]
    for line in lines:
        names = [*line["positives"], *line["negatives"]]
        line["scores"] = {name: float(len(names) - place) for place, name in enumerate(names)}
    write_jsonl(rooms / "data" / "several.jsonl", lines)
    return "several.jsonl"


def several(rooms: Path, folder: Path, name: str, **sections: Any) -> Path:
    """The configuration of a run with three teachers."""
    tree = settings(
        rooms, folder / name, losses=LOSSES, **{**sections, "train": {**TRAIN, **sections.get("train", {})}}
    )
    sharded = {**tree.pop("teacher"), "placement": "zero3", "weight": 2.0}
    bert = {**TEACHERS["dual_encoder"], "path": str(rooms / "bert"), "dtype": "fp32", "passage_length": 48}
    placed = {**bert, "placement": "zero3" if name.startswith("mixed") else "replicate"}
    tree["teachers"] = [sharded, placed, {"kind": "scores"}]
    tree["data"] |= {"train": scored(rooms)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_two_processes_equal_one(rooms: Path, tmp_path: Path) -> None:
    mixes: dict[str, dict[str, Any]] = {"parted": {}, "mixed": {"relevance": "nll", "vectors": "concatenate"}}
    alone = [several(rooms, tmp_path, name, mix=mix) for name, mix in mixes.items()]
    halved = {"batch_size": 2}
    both = [several(rooms, tmp_path, f"{name}-both", mix=mix, train=halved) for name, mix in mixes.items()]
    [found] = launch(JOB, 1, configs=list(map(str, alone)))
    [split, _] = launch(JOB, 2, configs=list(map(str, both)))
    for one, two in zip(found, split, strict=True):
        assert len(one) == 4, one
        np.testing.assert_allclose(two, one, rtol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "parted" / "metrics.jsonl").read_text().splitlines()]
    parts = rows[0]["parts"]
    assert {name for name in parts if ":" in name} == {
        *("response:0", "response:1", "response:2"),
        *("layer:0", "layer:1", "embedding:0", "embedding:1"),
    }
    assert parts["embedding"] == pytest.approx((2 * parts["embedding:0"] + parts["embedding:1"]) / 3)
    assert rows[0]["loss"] == pytest.approx(sum(parts[name] for name in ("response", "layer", "embedding")))
    told = json.loads((tmp_path / "parted" / "run.json").read_text())["teachers"]
    assert [teacher["placement"] for teacher in told] == ["zero3", "replicate", "scores"]
    assert "`llama` (dual encoder)" in (tmp_path / "parted" / "student" / "README.md").read_text()

    half = copy_run(alone[0], "resumed", step=2)
    with pytest.raises(InputError, match=r"teachers\.0\.weight changed"):
        distill(load_config(half, ["teachers.0.weight=3"]), resume=True, quiet=True)
    moved = tmp_path / "elsewhere"
    shutil.copytree(rooms / "bert", moved)
    distill(load_config(half, [f"teachers.1.path={moved}"]), resume=True, quiet=True)
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "parted")
    config = load_config(half)
    assert {"teachers.0: config.json", "teachers.1: model.safetensors"} <= facts(config).keys()
    plan = make_plan(requirements(config), Cluster(2, 1, 80 << 30))
    assert [teacher.key for teacher in plan.requirements.teachers] == ["teachers.0", "teachers.1"]
    assert "teachers.1.placement=replicate" in plan.changes


def growing(rooms: Path, folder: Path, name: str, **sections: Any) -> Path:
    """A run with teachers that come and go: the first alone, then both models, then the scores alone."""
    path = several(rooms, folder, name, **sections)
    tree = yaml.safe_load(path.read_text())
    for teacher, span in zip(tree["teachers"], ({"until": 2}, {"after": 1, "until": 3}, {"after": 3}), strict=True):
        teacher |= span
    path.write_text(yaml.safe_dump(tree))
    return path


def test_teachers_come_and_go(rooms: Path, tmp_path: Path) -> None:
    plain, sharded = ({"student": f"ds_configs/student_zero{stage}.json"} for stage in (1, 3))
    train = {"steps": 5, "lr": 1e-2, "clip": 0.1}
    alone = growing(rooms, tmp_path, "alone", deepspeed=plain, train=train)
    both = [
        growing(rooms, tmp_path, f"both{place}", deepspeed=zero, train={**train, "batch_size": 2})
        for place, zero in enumerate((plain, sharded))
    ]
    [[found]] = launch(JOB, 1, configs=[str(alone)])
    [split, _] = launch(JOB, 2, configs=list(map(str, both)))
    assert len(found) == 5, found
    for other in split:  # ZeRO-3 too, where a map that rests would keep its last gradient, and clip the others'
        np.testing.assert_allclose(other, found, rtol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    told = [{name for name in row["parts"] if ":" in name} for row in rows if "parts" in row]
    first, second = ({f"{name}:{place}" for name in ("response", "layer", "embedding")} for place in (0, 1))
    assert told == [first, first | second, second, {"response:2"}, {"response:2"}]
    parts = rows[1]["parts"]
    assert parts["response"] == pytest.approx((2 * parts["response:0"] + parts["response:1"]) / 3)
    assert rows[4]["loss"] == pytest.approx(rows[4]["parts"]["response"])

    for step in (2, 4):
        half = copy_run(alone, f"resumed{step}", step=step)
        distill(load_config(half), resume=True, quiet=True)
        assert losses_of(tmp_path / f"resumed{step}") == losses_of(tmp_path / "alone")
    with pytest.raises(InputError, match=r"teachers\.2\.after changed"):
        distill(load_config(copy_run(alone, "changed", step=4), ["teachers.2.after=2"]), resume=True, quiet=True)
    write_report(tmp_path / "alone")


def test_only_the_teacher_that_teaches_is_given_texts(rooms: Path, tmp_path: Path) -> None:
    config = load_config(growing(rooms, tmp_path, "run", train={"steps": 5}))
    with ranks() as all_ranks:
        batches = open_inputs(settled(config), all_ranks)[2]
    given = [[bool(batch) for batch in window.teachers] for window in batches.windows(0, 5)]
    assert given == [
        [True, False, False],
        [True, True, False],
        [False, True, False],
        [False, False, True],
        [False, False, True],
    ]
    assert all(batches.window(0).teachers)  # what is measured before the first step reads every one


REFUSED = {
    "no step": ({"teachers.1": {"after": 3, "until": 3}}, "teachers.1: until: 3 is not behind after: 3"),
    "too late": ({"teachers.1": {"after": 4}}, "teachers.1.after: 4 is beyond the run's last step, train.steps: 4"),
    "too long": ({"teachers.1": {"until": 5}}, "teachers.1.until: 5 is beyond the run's last step"),
    "gap": (
        {"teachers.0": {"until": 2}, "teachers.1": {"after": 3}},
        "teachers: nothing teaches at step 3, and no loss does without a teacher",
    ),
    "never mixed": (
        {"teachers.0": {"until": 2}, "teachers.1": {"after": 2}, "mix": {"relevance": "nll"}},
        "mix.relevance: nll is ignored",
    ),
    "beside": ({"teacher": {"kind": "scores"}}, "teachers: are given beside teacher"),
    "weight": ({"teachers": [{"kind": "scores", "weight": 2.0}]}, "teachers.0.weight: is ignored"),
    "unknown loss": ({"teachers.1": {"losses": ["respons"]}}, "teachers.1.losses: names respons"),
    "cannot give": ({"teachers.1": {"losses": ["layer"]}}, "teachers.1.losses: a teacher of kind scores has no layers"),
    "feeds none": ({"losses": {"response": {"weight": 0.0}}}, "teachers.1: feeds none of the losses"),
    "trained": (
        {"teachers.0": {"train": True, "placement": "auto", "dtype": "auto"}},
        "teachers.0.train: a teacher that is trained is the only one",
    ),
    "unfed": ({"teachers.0": {"losses": ["response"]}}, "losses.layer.weight: no teacher feeds it"),
    "mix": ({"mix": {"vectors": "concatenate"}}, "mix.vectors: concatenate is ignored"),
    "lens": ({"teachers.0": {"lens": "tuned"}}, "teachers.0.lens_path: is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(rooms: Path, tmp_path: Path, name: str) -> None:
    changes, told = REFUSED[name]
    tree = yaml.safe_load(several(rooms, tmp_path, "run").read_text())
    del tree["teachers"][1]
    for key, value in changes.items():
        if key.startswith("teachers."):
            tree["teachers"][int(key[-1])] |= value
        else:
            tree[key] = {**tree[key], **value} if key == "losses" else value
    if name not in ("unfed", "feeds none"):
        tree["losses"] = {**LOSSES, "embedding": {"weight": 0.0}}
    path = tmp_path / "refused.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError) as refused:
        load_config(path)
    assert told in str(refused.value)
