"""What is given is used, or refused: lengths that leave no text, splits that are not there; and edges of beginning and ending."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lead_ds.config import load_config, save_config
from lead_ds.data.batches import Batches
from lead_ds.data.groups.open import open_groups
from lead_ds.data.reads import Reads, refuse_equal, refuse_voided
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.distributed.signals import Signals
from lead_ds.engine.training.evaluation import Evaluator
from lead_ds.errors import InputError
from lead_ds.models.load import load_text
from lead_ds.relevance import ScoreFeatures
from lead_ds.teachers.finite import say_constant
from lead_ds.teachers.fit_lens import Fit, fit_lens
from lead_ds.teachers.teach import teach
from lead_ds.teachers.teacher import TeacherView
from tests.helpers.batches import windows_of
from tests.helpers.forked import lead_ds
from tests.helpers.tiny import write_jsonl

Configure = Callable[..., Path]
ALONE = Ranks(0, 0, 1, torch.device("cpu"))
PROMPT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen "


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"query_prompt": PROMPT, "query_length": 8},
            r"^student\.query_length: is 8, and all queries .* read the same",
        ),
        ({"passage_prompt": PROMPT, "passage_length": 8}, r"^student\.passage_length: is 8, and all passages"),
        ({"query_length": 2}, r"^student\.query_length: is 2"),
        ({"query_prompt": "one ", "query_length": 16}, None),
    ],
)
def test_a_length_that_leaves_nothing_of_the_texts(
    configure: Configure, changed: dict[str, Any], told: str | None
) -> None:
    config = load_config(configure())
    student = Reads(load_text(config.student.model_copy(update=changed)))
    groups = open_groups(config.data)
    batches = Batches(groups, student, {}, config.data, config.train, seed=0, ranks=ALONE)
    if told is None:
        batches.check(1)
    else:
        with pytest.raises(InputError, match=told):
            batches.check(1)


def test_a_length_that_leaves_nothing_of_pairs_is_refused_by_whatever_reads_them(
    configure: Configure, tmp_path: Path
) -> None:
    config = load_config(configure("cross", teacher="cross_encoder", extra_teacher={"max_length": 4}))
    told = r"teacher\.max_length: is 4, and all queries .* read the same"
    with pytest.raises(InputError, match=told):
        teach(config, tmp_path / "cache", quiet=True)
    with pytest.raises(InputError, match=told):
        fit_lens(config, tmp_path / "lens", Fit(), quiet=True)


def test_words_that_a_tokenizer_does_not_know_are_told_as_such(configure: Configure) -> None:
    encoder = load_text(load_config(configure()).student)
    told = r"student: reads all queries that were looked at the same, first '\u0e01\u0e02' and '\u0e03\u0e04' \(its tokenizer"
    with pytest.raises(InputError, match=told):
        refuse_voided(encoder, ["\u0e01\u0e02", "\u0e03\u0e04"], [], "student")


def test_a_passage_compared_with_nothing_is_told(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(configure(data={"negatives": 0}, train={"batch_size": 1}))
    student = Reads(load_text(config.student))
    batches = Batches(open_groups(config.data), student, {}, config.data, config.train, seed=0, ranks=ALONE)
    batches.check(1)
    assert "every query is compared with its positive alone" in capsys.readouterr().err
    batches.check(2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("query", "passages", "told"),
    [
        ("same", ["passage {}", "other {}"], "4 groups, taken from all over it, have the same query"),
        ("query {}", ["same", "same"], "have one and the same passage"),
        ("query {}", ["text {}", "text {}"], "have one text as their positive and all their negatives"),
        ("query {}", ["text {}", "other"], None),
    ],
)
def test_groups_that_teach_nothing(configure: Configure, query: str, passages: list[str], told: str | None) -> None:
    groups = open_groups(load_config(configure()).data)
    drawn = [
        replace(groups.draw(row, 0, 0), query=query.format(row), passages=[text.format(row) for text in passages])
        for row in range(4)
    ]
    with nullcontext() if told is None else pytest.raises(InputError, match=told):
        refuse_equal(drawn, groups.path)


def test_a_teacher_that_says_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    scores = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]])
    for group in (3, 1):
        say_constant("teachers.1", TeacherView(ScoreFeatures(scores[..., :group])), group, ALONE)
        assert ("teachers.1: gives all passages of a query the same" in capsys.readouterr().err) == (group == 3)
    scores[0, 1, 2] = 3.0
    say_constant("teachers.0", TeacherView(ScoreFeatures(scores)), 3, ALONE)
    assert not capsys.readouterr().err


def test_teach_tells_of_a_teacher_that_says_nothing_and_of_queries_that_are_passages(
    configure: Configure, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(rooms / "cross", tmp_path / "cross")
    weights = load_file(tmp_path / "cross" / "model.safetensors")
    weights["classifier.weight"].zero_()
    save_file(weights, tmp_path / "cross" / "model.safetensors", {"format": "pt"})
    lines = [
        {"query": f"which thing {word}", "pos": [f"the {word}"], "neg": [f"a {word}", "bread"]}
        for word in ("owl", "camel")
    ]
    lines[0]["query"] = "bread"
    data = write_jsonl(tmp_path / "train.jsonl", lines)
    sections = {"data": {"train": str(data), "format": "flagembedding", "negatives": 1}, "train": {"batch_size": 2}}
    path = configure("cache", teacher="cross_encoder", extra_teacher={"path": str(tmp_path / "cross")}, **sections)
    teach(load_config(path), tmp_path / "cache", quiet=True)
    told = capsys.readouterr().err
    assert "cache: holds of all passages of a query the same relevance" in told
    assert "train.jsonl: 1 of 2 groups: a passage that is the query itself is not a negative of it" in told


@pytest.mark.parametrize(
    ("evaluation", "patience", "told"),
    [
        ({"split": "devv"}, 0, r"evaluation\.split: devv: there is no qrels/devv\.tsv.*splits here: dev, test, train"),
        ({"split": "dev"}, 3, r"evaluation\.split: dev: there is no qrels/dev\.tsv"),
        ({"split": "dev"}, 0, None),
    ],
)
def test_a_split_that_is_not_there(
    configure: Configure,
    rooms: Path,
    tmp_path: Path,
    evaluation: dict[str, Any],
    patience: int,
    told: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = rooms / "data"
    if evaluation["split"] == "dev":
        data = tmp_path / "data"
        data.mkdir()
    train = {"patience": patience, "evaluate_every": min(1, patience)}
    config = load_config(configure(evaluation=evaluation, train=train, data={"path": str(data)}))
    encoder = load_text(config.student)
    if told is not None:
        with pytest.raises(InputError, match=told):
            Evaluator.open(config, encoder, ALONE)
        return
    assert Evaluator.open(config, encoder, ALONE) is None
    assert "no evaluation while training" in capsys.readouterr().err


@pytest.mark.parametrize("title", [1984, ["a", "b"], {"en": "x"}, True])
def test_a_title_is_a_text(configure: Configure, tmp_path: Path, title: object) -> None:
    write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": "p", "title": None, "text": "x"}, {"_id": "q", "title": title, "text": "y"}]
    )
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "y"}])
    write_jsonl(tmp_path / "train.jsonl", [{"query_id": "q", "positives": ["q"]}])
    config = load_config(configure(data={"path": str(tmp_path), "negatives": 1}))
    with pytest.raises(InputError, match=r"corpus\.jsonl:2: the field 'title' is not a string"):
        open_groups(config.data)
    passage = {"docid": "a", "title": title, "text": "x"}
    write_jsonl(tmp_path / "train.jsonl", [{"query": "y", "positive_passages": [passage]}])
    with pytest.raises(InputError, match=r"train\.jsonl:1: the field 'positive_passages' .* a title that is a text"):
        open_groups(config.data)


def test_a_full_disk_leaves_no_empty_configuration(configure: Configure, tmp_path: Path) -> None:
    """Files of this process may hold so few bytes as a full disk would take."""
    config = load_config(configure())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(Exception, match="cannot be written"):
            save_config(config, tmp_path / "new" / "config.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "new").iterdir())


def test_a_lost_terminal_ends_a_run_with_a_checkpoint_and_nohup_does_not() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    program = (
        "import signal\nfrom lead_ds.engine.distributed.signals import Signals\n"
        "with Signals() as signals:\n    signal.raise_signal(signal.SIGHUP)\n    print(signals.received)"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_a_teacher_that_says_nothing_after_the_first_step_is_told(configure: Configure, rooms: Path) -> None:
    lines = [json.loads(line) for line in (rooms / "data" / "train.jsonl").read_text().splitlines()[:12]]
    for line in lines:
        names = dict.fromkeys([*line["positives"], *line["negatives"]])
        line["scores"] = {name: float(place) for place, name in enumerate(names)}
    write_jsonl(rooms / "data" / "later.jsonl", lines)
    sections: dict[str, Any] = {
        "data": {"train": "later.jsonl"},
        "losses": {"layer": {"weight": 0.0}, "response": {"weight": 1.0}},
        "train": {"steps": 3, "log_every": 2, "save_every": 100},
    }
    path = configure("later", **sections)
    tree = yaml.safe_load(path.read_text())
    tree["teacher"] = {"kind": "scores"}
    path.write_text(yaml.safe_dump(tree))
    third = windows_of(load_config(path), ALONE).window(2).query_ids
    for line in lines:
        if line["query_id"] in third:
            line["scores"] = dict.fromkeys(line["scores"], 1.0)
    write_jsonl(rooms / "data" / "later.jsonl", lines)
    done = lead_ds("distill", path, "--quiet")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("teacher: gives all passages of a query the same relevance, for all queries of a step") == 1
    )
