"""Bad input: status 2, one line that says where, what and what to do, no traceback, nothing written."""

from __future__ import annotations

import gzip
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

from lead_ds.engine.distributed.ranks import free_port
from tests.helpers.forked import lead_ds
from tests.helpers.launch import ROOT, launch
from tests.helpers.rooms import settings

JOB = "tests.engine.jobs:distil_each"


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def duplicated(folder: Path) -> None:
    edit(folder / "corpus.jsonl", lambda lines: [*lines, lines[3]])


def malformed(folder: Path) -> None:
    edit(folder / "corpus.jsonl", lambda lines: [*lines[:6], lines[6][:-4], *lines[7:]])


def malformed_gz(folder: Path) -> None:
    malformed(folder)
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.write((folder / "corpus.jsonl").read_text())
    (folder / "corpus.jsonl").unlink()


def unknown_in_groups(folder: Path) -> None:
    def change(lines: list[str]) -> list[str]:
        group = json.loads(lines[4])
        group["negatives"][1] = "p999"
        return [*lines[:4], json.dumps(group), *lines[5:]]

    edit(folder / "train.jsonl", change)


def unknown_in_qrels(folder: Path) -> None:
    edit(folder / "qrels" / "dev.tsv", lambda lines: [*lines, "q1\tp999\t1"])


def empty_corpus(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("")


def no_groups(folder: Path) -> None:
    (folder / "train.jsonl").write_text("")


# What is done to the data folder -> what the error must say.
DATA = {
    "missing corpus": (lambda folder: without(folder, "corpus.jsonl"), ["corpus.jsonl"]),
    "missing groups": (lambda folder: without(folder, "train.jsonl"), ["train.jsonl"]),
    "malformed line": (malformed, ["corpus.jsonl:7"]),
    "malformed line in gz": (malformed_gz, ["corpus.jsonl.gz:7"]),
    "duplicate id": (duplicated, ["corpus.jsonl:61", "p3"]),
    "unknown id in groups": (unknown_in_groups, ["train.jsonl:5", "p999"]),
    "unknown id in qrels": (unknown_in_qrels, ["dev.tsv", "p999"]),
    "empty corpus": (empty_corpus, ["corpus.jsonl"]),
    "no groups": (no_groups, ["train.jsonl"]),
}


def pickle_only(rooms: Path, folder: Path) -> Path:
    from transformers import BertModel

    shutil.copytree(rooms / "student", folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def errors(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """What each kind of bad input ended with, and the output folder it named."""
    root = tmp_path_factory.mktemp("bad")
    trees: dict[str, dict[str, Any]] = {}
    for name, (harm, _) in DATA.items():
        folder = root / name.replace(" ", "_")
        shutil.copytree(rooms / "data", folder)
        shutil.rmtree(folder / ".lead_ds", ignore_errors=True)
        harm(folder)  # type: ignore[operator]
        evaluation = {"split": "dev"} if "qrels" in name else {"split": None}
        trees[name] = settings(rooms, root / f"{folder.name}-out", data={"path": str(folder)}, evaluation=evaluation)

    def add(name: str, **sections: Any) -> None:
        trees[name] = settings(rooms, root / name.replace(" ", "_"), **sections)

    add("layer out of range", losses={"layer": {"select": "given", "teacher_layers": [1, 5], "student_layers": [0, 1]}})
    add("k beyond the student", losses={"layer": {"k": 4}})
    add("student layers out of range", student={"layers": [0, 7]})
    add("not a model", student={"path": str(rooms / "data")})
    add("no such model", student={"path": str(rooms / "nothing" / "here")})
    add("pickle only", student={"path": str(pickle_only(rooms, root / "pickled"))})
    add("pickle allowed", student={"path": str(root / "pickled"), "allow_pickle": True}, train={"steps": 1})
    add("cross-encoder without a head", teacher="cross_encoder", extra_teacher={"path": str(rooms / "bert")})
    add("more queries than groups", train={"batch_size": 31})
    add("metric not measured", evaluation={"split": "dev", "metric": "RR@7"})
    add("no deepspeed configuration", deepspeed={"student": "ds_configs/absent.json"})
    occupied = root / "occupied"
    occupied.mkdir()
    (occupied / "config.yaml").write_text("")
    add("occupied")
    paths = []
    for index, tree in enumerate(trees.values()):
        path = root / f"{index}.yaml"
        path.write_text(yaml.safe_dump(tree))
        paths.append(str(path))
    [results] = launch(JOB, 1, configs=paths)
    return {name: (result, Path(trees[name]["output"])) for name, result in zip(trees, results, strict=True)}


EXPECTED = {
    **{name: says for name, (_, says) in DATA.items()},
    "layer out of range": ["losses.layer.teacher_layers", "layer 5", "5 layers", "0 to 4"],
    "k beyond the student": ["losses.layer.k", "the student 3", "at most 3"],
    "student layers out of range": ["7", "3 layers"],
    "not a model": ["data", "config.json"],
    "no such model": ["nothing/here"],
    "pickle only": ["pickle", "allow_pickle"],
    "cross-encoder without a head": ["bert", "head"],
    "more queries than groups": ["has 30 groups", "= 31", "lower train.batch_size"],
    "metric not measured": ["evaluation.metric", "RR@7"],
    "no deepspeed configuration": ["absent.json", "ds_configs/"],
    "occupied": ["already holds a run", "--resume"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_told_in_one_line_and_nothing_written(errors: dict[str, tuple[Any, Path]], name: str) -> None:
    told, output = errors[name]
    assert isinstance(told, str), f"the run went through: {told}"
    for words in EXPECTED[name]:
        assert words in told, told
    assert "\n" not in told
    assert "(" in told, f"no remedy in: {told}"
    if name == "occupied":
        assert [p.name for p in output.iterdir()] == ["config.yaml"]
    else:
        assert not output.exists()


def test_pickled_weights_are_read_where_they_are_allowed(errors: dict[str, tuple[Any, Path]]) -> None:
    losses, output = errors["pickle allowed"]
    assert len(losses) == 1, losses
    assert (output / "student" / "model.safetensors").exists()


def test_more_ranks_than_groups(rooms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(rooms / "data", folder)
    edit(folder / "train.jsonl", lambda lines: lines[:1])
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(settings(rooms, tmp_path / "out", data={"path": str(folder)}, train={"batch_size": 1}))
    )
    for [told] in launch(JOB, 2, configs=[str(path)]):
        assert "has 1 groups" in told
        assert "2 * 1 * 1 = 2" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["distill", "nowhere.yaml"], "error: nowhere.yaml: no such configuration file"),
        (["distill"], "error: lead-ds distill: Missing argument 'CONFIG' (see lead-ds distill --help)"),
        (["distil", "x.yaml"], "error: lead-ds: No such command 'distil'"),
        (["report", "nowhere"], "error: nowhere"),
        (["evaluate", "--split", "dev", "--run", "r", "--split=test"], "error: --split: is given twice (keep one"),
        (
            ["evaluate", "--run", "r", "--qrels", "q", "--split", "dev"],
            "error: --split: goes with --model (take it out",
        ),
        (["evaluate", "--run", "r", "--qrels", "q", "--batch-size", "3"], "error: --batch-size: goes with --model"),
        (["evaluate", "--run", "r", "--qrels", "q", "--per-query"], "error: --per-query: is reported as JSON alone"),
        (
            ["evaluate", "--model", "m", "--data", "d", "--layout", "shard"],
            "error: --layout: is of an index on several",
        ),
        (
            ["search", "--model", "m", "--data", "d", "x", "--nprobe", "3"],
            "error: --nprobe: is of an index (add --index",
        ),
        (["search", "--model", "m", "--data", "d", "x", "--gpus", "1"], "error: --gpus: is of an index (add --index"),
        (["search", "--model", "m", "--data", "d", "x", "--split", "dev"], "error: --split: is of a dataset's queries"),
        (["search", "--model", "m", "--data", "d", "x", "--tag", "t"], "error: --tag: is written into a run"),
        (["search", "--model", "m", "--data", "d", "--json"], "error: --out: is needed for a dataset's queries"),
        (["search", "--model", "m", "--data", "d", "--json", "--out", "o"], "error: --json: prints hits"),
        (["index", "--vectors", "v", "--out", "o", "--layout", "replicate"], "error: --layout: is of an index on"),
        (["export", "--model", "m", "--to", "onnx", "o", "--split", "dev"], "error: --split: is of --data (add --data"),
        (["doctor", "--ssh-port", "22"], "error: --ssh-port: is of the hosts of a hostfile"),
        (["mine", "--data", "d", "--out", "o", "--seed", "3"], "error: mine: configuration: seed is ignored by sample"),
        (["mine", "--data", "d", "--out", "o", "--margin", "inf"], "error: mine: margin: input should be a finite"),
        (["search", "-k", "3", "--data", "d", "-k", "5", "--", "-k"], "error: -k: is given twice (keep one"),
        (["encode", "--model", "m", "--data", "d", "--out", "o", "dim=2", "dim=4"], "error: dim=4: takes away 'dim=2'"),
    ],
)
def test_status_2_and_one_line(arguments: list[str], says: str) -> None:
    done = lead_ds(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(says), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", ""), ("MASTER_PORT", "-1")])
def test_an_environment_that_no_launcher_makes(name: str, value: str) -> None:
    done = lead_ds("distill", "nowhere.yaml", **{name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name}: is {value!r} in the environment, and no number"), done.stderr


def test_under_the_launcher_the_status_is_2_and_rank_0_tells(configure: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), "--module", "lead_ds"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    path = configure(data={"path": "nowhere"})
    done = subprocess.run(
        [*command, "distill", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2, done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    done = lead_ds("distill", "nowhere.yaml", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_help_teaches() -> None:
    done = lead_ds("--help")
    assert done.returncode == 0
    for command in ("demo", "warmup", "distill", "report"):
        assert command in done.stdout
    assert "deepspeed" in lead_ds("distill", "--help").stdout
