"""A run from Python is the run of the command line; what Python alone can give works too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lead_ds import Callback, Distiller, load, losses
from lead_ds.config import load_config
from lead_ds.errors import InputError
from tests.face.conftest import ROWS
from tests.face.own_models import Words
from tests.helpers.forked import lead_ds
from tests.helpers.launch import ROOT, launch
from tests.helpers.rooms import settings
from tests.helpers.tiny import write_jsonl

Make = Callable[..., Distiller]


class Nameless(losses.Loss):
    """A loss without a name."""


class Usurper(losses.Loss):
    """A loss with another's name."""

    name, Settings, needs = "response", losses.LossSettings, frozenset()


def sprawl(power: int) -> type[losses.Loss]:
    """A loss of a notebook's cell, with a weight that is trained, as it is when the cell is run."""

    class SprawlSettings(losses.LossSettings):
        """Its settings."""

        margin: float = 0.5

    class Sprawl(losses.Loss):
        """Passages that are alike."""

        name, Settings, needs = "sprawl", SprawlSettings, frozenset()

        def __init__(self, settings: Any, shape: losses.LossShape) -> None:
            super().__init__(settings, shape)
            self.scale = torch.nn.Parameter(torch.ones(shape.student.layers))

        def forward(self, views: losses.Views) -> torch.Tensor:
            p_PD = views.student.final.p_KPD[-1]  # type: ignore[attr-defined]
            return (self.scale.mean() * (p_PD @ p_PD.T) - self.settings.margin).relu().pow(power).mean()

    return Sprawl


def losses_of(run: Distiller) -> list[float]:
    return [row["loss"] for row in run.metrics if "loss" in row]


def test_rows_train_as_the_lines_of_a_file_and_a_dataset_do(distiller: Make, tmp_path: Path) -> None:
    import datasets

    file = write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    runs = [
        distiller("rows").train(quiet=True),
        distiller("dataset", data=datasets.Dataset.from_list(ROWS)).train(quiet=True),
        distiller("file", data=file).train(quiet=True),
        distiller("folder", data=file.parent, workers=1).train(quiet=True),
        distiller("workers", workers=1).train(quiet=True),
    ]
    expected = losses_of(runs[0])
    assert len(expected) == 3
    assert all(losses_of(run) == expected for run in runs)
    assert not {"RANK", "WORLD_SIZE"} & set(os.environ)
    assert not torch.distributed.is_initialized()


def test_python_and_the_command_line_run_the_same(rooms: Path, tmp_path: Path, configure: Callable[..., Path]) -> None:
    path = configure("command")
    done = lead_ds("distill", path, "-q")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"student: {tmp_path / 'command' / 'student'}\n"
    of_command = Distiller.of(load_config(path))

    tree = settings(rooms, tmp_path / "python")
    losses = {"contrastive": {}, "response": {}, **tree.pop("losses")}
    run = Distiller(tree.pop("teacher"), student=tree.pop("student"), data=tree.pop("data"), losses=losses, **tree)
    same = run.config.model_copy(update={"output": of_command.config.output})
    assert same == of_command.config
    run.train(quiet=True)
    assert losses_of(run) == losses_of(of_command)
    texts = ["The octopus has three hearts."]
    assert torch.equal(run.student.encode(texts), of_command.student.encode(texts))


def test_a_run_is_stopped_resumed_saved_and_evaluated(distiller: Make, rooms: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, metrics: dict[str, Any]) -> bool:
            return metrics["step"] == 1

    whole = distiller("whole").train(quiet=True)
    run = distiller("part", callbacks=[Stop()])
    with pytest.raises(InputError, match="train first"):
        run.student  # noqa: B018
    assert len(losses_of(run.train(quiet=True))) == 1
    with pytest.raises(InputError, match="already holds a run"):
        run.train(quiet=True)
    changed = [*ROWS[:-1], {**ROWS[-1], "query": "another"}]
    with pytest.raises(InputError, match="files that have changed: data: rows"):
        distiller("part", data=changed).train(resume=True, quiet=True)
    with pytest.raises(InputError, match="accept-changed: is ignored without --resume"):
        distiller("new").train(accept_changed=["rows"])
    shutil.copytree(run.output, run.output.with_name("accepted"))
    accepted = distiller("accepted", data=changed).train(resume=True, accept_changed=["rows"], quiet=True)
    assert losses_of(accepted)[:1] == losses_of(whole)[:1]
    [told] = json.loads((accepted.output / "run.json").read_text())["accepted_changes"]
    assert (told["name"], told["step"]) == ("data: rows", 1)
    resumed = distiller("part").train(resume=True, quiet=True)
    assert losses_of(resumed) == losses_of(whole)

    vectors = resumed.student.encode(["a text"])
    assert torch.equal(vectors, whole.student.encode(["a text"]))
    saved = resumed.save(tmp_path / "saved")
    assert torch.equal(load(saved).encode(["a text"]), vectors)
    with pytest.raises(InputError, match="is there already"):
        resumed.save(saved)
    values = resumed.evaluate(rooms / "data", "dev", measures=["nDCG@10", "R@5"])
    assert set(values) == {"nDCG@10", "R@5"}
    assert all(0 <= value <= 1 for value in values.values())
    with pytest.raises(InputError, match=r"no qrels/absent\.tsv"):
        resumed.evaluate(rooms / "data", "absent")
    with pytest.raises(InputError, match=r"no qrels/dev\.tsv|no such file"):  # of rows there are no judgements
        resumed.evaluate()


def test_labels_alone_and_evaluation_while_training(distiller: Make, rooms: Path) -> None:
    run = distiller(teacher=None, losses=None, evaluation={"path": str(rooms / "data"), "queries": 4}, evaluate_every=2)
    parts = run.train(quiet=True).metrics
    assert [row["step"] for row in parts if "evaluation" in row] == [2, 3]
    assert all(set(row["parts"]) == {"contrastive"} for row in parts if "loss" in row)


def test_a_loaded_model_is_a_teacher_and_a_student(distiller: Make, rooms: Path, tmp_path: Path) -> None:
    teacher = load(rooms / "cross", max_length=64)
    run = distiller(teacher=teacher, student=load(rooms / "student", passage_length=20), losses={"response": {}})
    assert run.config.teacher is not None
    assert (run.config.teacher.kind, run.config.teacher.max_length) == ("cross_encoder", 64)
    assert run.config.student.passage_length == 20
    assert run.config.losses.response.weight == 1
    assert run.config.losses.contrastive.weight == run.config.losses.layer.weight == 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"step": 3}, "Distiller: step: unknown setting .did you mean 'steps'?"),
        ({"steps": 0}, r"Distiller: train.steps: .* got 0"),
        ({"losses": {"respons": {}}}, r"did you mean 'response'"),
        ({"losses": 3}, "a int is not a set of losses"),
        ({"losses": [3]}, "a int is not a loss"),
        ({"losses": [losses.Response(wieght=3)]}, r"losses.response.wieght.*did you mean 'weight'"),
        ({"losses": [losses.Response(weight=-3)]}, r"losses.response.weight"),
        ({"losses": [losses.Response(), losses.Response()]}, "response is there twice"),
        ({"losses": [Nameless]}, r"losses.Nameless: .*name"),
        ({"losses": [Usurper]}, "registered twice"),
        ({"student": 3}, "a int is not a student"),
        ({"data": 3}, "a int is not a list of rows"),
        ({"data": "absent"}, "no such folder"),
        ({"callbacks": [print]}, "is not a Callback"),
        ({"teacher": "absent/model"}, "absent/model"),
        ({"losses": {"response": {"weight": 1}}, "teacher": None}, "a teacher section is missing"),
        ({"batch_size": 50}, "has 12 groups"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(distiller: Make, change: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        distiller(**change).train(quiet=True)


def test_losses_by_class_and_one_of_ones_own(distiller: Make) -> None:
    named = distiller("named", losses={"response": {"weight": 2}, "layer": {"k": 2, "select": "last"}})
    listed = distiller("listed", losses=[losses.Response(weight=2), losses.Layer(k=2, select="last")])
    assert listed.config.losses == named.config.losses
    assert (listed.config.losses.contrastive.weight, listed.config.losses.layer.weight) == (0, 1)

    found = []
    for power in (1, 2):  # the cell is run again, changed
        loss = sprawl(power)
        run = distiller(f"own{power}", losses=[losses.Response(), loss(margin=0.25)]).train(quiet=True)
        assert run.config.losses.sprawl.margin == 0.25
        found.append([row["parts"]["sprawl"] for row in run.metrics if "loss" in row])
    assert found[0] != found[1]
    alone = distiller("alone", losses=[loss]).train(quiet=True)
    assert all(set(row["parts"]) == {"sprawl"} for row in alone.metrics if "loss" in row)


def test_the_front_door_is_light() -> None:
    code = (
        "import time; start = time.process_time(); import lead_ds; took = time.process_time() - start\n"
        "import sys; print(took, 'torch' in sys.modules, 'pydantic' in sys.modules, sorted(lead_ds.__all__))"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, rest = done.stdout.split(" ", 1)
        took.append(float(seconds))
        assert rest.strip() == "False False " + str(
            ["Callback", "Distiller", "Model", "Reranker", "Searcher", "load", "losses"]
        )
    assert min(took) < 0.1
    import lead_ds

    assert {name for name in lead_ds.__all__ if getattr(lead_ds, name)} == set(lead_ds.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Distillator'"):
        lead_ds.Distillator  # noqa: B018


def test_a_configuration_of_rows_says_where_they_came_from(distiller: Make) -> None:
    run = distiller().train(quiet=True)
    tree = yaml.safe_load((run.output / "config.yaml").read_text())
    assert tree["data"]["path"] == "(rows given from Python)"
    with pytest.raises(InputError, match="rows given from Python"):
        Distiller.of(load_config(run.output / "config.yaml")).train(resume=True, quiet=True)


def test_a_script_under_a_launcher_trains_twice(distiller: Make, rooms: Path, tmp_path: Path) -> None:
    first, second = launch("tests.face.jobs:script", 2, rooms=str(rooms), out=str(tmp_path))
    assert first == second  # what a rank sees of the runs, and what it is refused
    assert len(first["first"]["losses"]) == 3
    assert len(first["second"]["losses"]) == 1
    assert first["first"]["losses"][:1] == first["second"]["losses"]
    assert first["rows"].startswith("data: rank 1 was given others than rank 0")
    assert first["callbacks"].startswith("callbacks: rank 1 was given others")
    assert load(tmp_path / "saved-first").encode(["a text"])[0].tolist() == first["first"]["vector"]
    alone = distiller(seed=888).train(quiet=True)  # one process with the batch of both
    assert losses_of(alone) == pytest.approx(first["first"]["losses"], rel=1e-5)
    own = distiller("own-alone", seed=888, student=Words()).train(quiet=True)  # there sharded by ZeRO-3
    assert losses_of(own) == pytest.approx(first["own"]["losses"], rel=1e-5)
    assert own.student.encode(["a text"])[0].tolist() == pytest.approx(first["own"]["vector"], rel=1e-4, abs=1e-6)


def test_several_teachers_one_of_them_a_module(distiller: Make, rooms: Path) -> None:
    cross = {"path": rooms / "cross", "kind": "cross_encoder", "dtype": "fp32", "max_length": 64}
    own = {"module": Words(seed=1), "scale": "cosine", "weight": 3.0, "losses": ["response", "embedding"]}
    teachers = [{**cross, "losses": ["response"]}, own]
    run = distiller(teacher=teachers, losses={"response": {}, "embedding": {}}, steps=1)
    assert list(run.config.taught) == ["teachers.0", "teachers.1"]
    run.train(quiet=True)
    parts = json.loads((run.output / "metrics.jsonl").read_text().splitlines()[0])["parts"]
    assert set(parts) == {"response", "response:0", "response:1", "embedding"}
    assert parts["response"] == pytest.approx(0.25 * parts["response:0"] + 0.75 * parts["response:1"])
