"""The quality benchmark: its arms are configurations, its collections hold what is judged, its tables tell a difference."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality_arms import ARMS, settings
from benchmarks.quality_data import Size, build_test, build_training, mine_by, without_dropout
from benchmarks.quality_layers import hidden, row_of
from benchmarks.quality_report import rows_of, write
from lead_ds.config import Config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.groups.group import Group
from lead_ds.errors import InputError
from tests.helpers.rooms import save_bert
from tests.helpers.tiny import tiny_dataset

TESTS = ("squadshifts", "medquad", "tldr")


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_configuration(arm, tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("student", "cut", "ce", "de", "mp", "cb")}
    config = Config.model_validate(settings(arm, tmp_path, models, negatives=3, steps=10, batch=4, lr=1e-5, seed=3))
    assert config.losses.needs_teacher == (arm.teacher is not None)
    assert config.teacher is None or config.teacher.train == arm.cotrain
    assert (config.losses.layer.weight > 0) == arm.name.startswith("lead")


def test_collections(tmp_path: Path) -> None:
    sets = {name: tiny_dataset(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))}
    size = Size(train=5, dev=2, passages=20, negatives=1)
    joined = build_training(tmp_path / "joined", sets, size)
    groups = [json.loads(line) for line in (joined / "train.jsonl").read_text().splitlines()]
    assert (
        0 < len(groups) <= 10
    )  # BM25 finds only what shares a word with the query: groups that lack some are left out
    assert {name.split(":")[0] for name in Dataset.open(joined).queries.ids} == {"one", "two"}
    assert {len(group["negatives"]) for group in groups} == {1}
    assert len(Dataset.open(joined).qrels("dev")) == 4  # and every judged id has a text
    test = build_test(tmp_path / "test", "one", sets["one"], size)
    whole, drawn = Dataset.open(sets["one"]), Dataset.open(test)
    assert len(drawn.corpus) == 20 < len(whole.corpus)
    assert drawn.qrels("test") == whole.qrels("test")
    before = (test / "corpus.jsonl").stat().st_mtime_ns
    build_test(tmp_path / "test", "one", sets["one"], size)
    assert (test / "corpus.jsonl").stat().st_mtime_ns == before


def test_negatives_of_a_model_take_the_place_of_bm25s_and_stay(tmp_path: Path) -> None:
    sets = {"one": tiny_dataset(tmp_path / "one")}
    size = Size(train=6, dev=2, passages=20, negatives=3)
    joined = build_training(tmp_path / "joined", sets, size)
    groups = joined / "train.jsonl"
    first = groups.read_text()
    mine_by(save_bert(tmp_path / "model", layers=1, width=16), joined, 3)
    mined = groups.read_text()
    assert mined != first
    positives = Dataset.open(joined).qrels("train")
    found = [json.loads(line) for line in mined.splitlines()]
    assert {group["query_id"] for group in found} == set(positives)
    for group in found:
        assert len(set(group["negatives"]) - set(positives[group["query_id"]])) == 3
    build_training(tmp_path / "joined", sets, size)
    assert groups.read_text() == mined


def test_a_copy_without_dropout(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tree = {
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "hidden_size": 8,
        "classifier_dropout": None,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree))
    changed = json.loads((without_dropout(tmp_path / "model", tmp_path / "copy") / "config.json").read_text())
    assert changed == {**tree, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_the_table_tells_a_difference_from_none(tmp_path: Path) -> None:
    rng = random.Random(0)
    base = {test: {f"q{i}": rng.random() * 0.5 for i in range(60)} for test in TESTS}
    noise = {test: {q: v + rng.gauss(0, 0.05) for q, v in values.items()} for test, values in base.items()}
    better = {test: {q: v + 0.1 + rng.gauss(0, 0.05) for q, v in values.items()} for test, values in base.items()}
    (tmp_path / "scores").mkdir()
    for name, scores in (("labels", base), ("response", noise), ("lead", better)):
        for seed in (1, 2):
            tree = {"scores": {test: {"nDCG@10": values} for test, values in scores.items()}, "steps": 1}
            (tmp_path / "scores" / f"{name}-{seed}.json").write_text(json.dumps(tree))
    table = write(tmp_path / "scores", tmp_path / "out.json")
    rows = {row["arm"]: row for row in json.loads((tmp_path / "out.json").read_text())["trained_on"]}
    against = rows["lead"]["against_labels"]
    assert against["p"] < 1e-3
    assert against["interval"][0] < 0.1 < against["interval"][1]
    assert against["interval"][0] > 0.08
    none = rows["response"]["against_labels"]
    assert none["interval"][0] < 0 < none["interval"][1] or none["p"] > 0.01
    assert rows["lead"]["seeds"] == [1, 2]
    assert table.count("| LEAD") == 1
    assert rows_of({}, TESTS) == []


def test_rows_of_an_earlier_table_stay_where_asked(tmp_path: Path) -> None:
    def runs(folder: str, arm: str, steps: int, value: float) -> Path:
        (tmp_path / folder).mkdir()
        tree = {"scores": {test: {"nDCG@10": {"q": value}} for test in TESTS}, "steps": steps}
        (tmp_path / folder / f"{arm}-1.json").write_text(json.dumps(tree))
        return tmp_path / folder

    out = tmp_path / "out.json"
    write(runs("one", "labels", 1, 0.25), out)
    write(runs("two", "response", 1, 0.75), out, keep=True)
    rows = json.loads(out.read_text())["trained_on"]
    assert [(row["arm"], row["mean"]) for row in rows] == [("labels", 0.25), ("response", 0.75)]
    with pytest.raises(InputError, match="another steps"):
        write(runs("three", "lead", 2, 0.5), out, keep=True)
    write(tmp_path / "two", out)
    assert [row["arm"] for row in json.loads(out.read_text())["trained_on"]] == ["response"]
    with pytest.raises(InputError, match="no scores"):
        write(tmp_path / "four", out)


def test_what_a_layer_knows_by_hand() -> None:
    def group(keys: list[int], positives: list[int]) -> Group:
        return Group("q", "?", [], [], np.array(keys), np.array(positives))

    # The second group's negative answers the first query too: no candidate for it.
    mask = hidden([group([1, 5], [1, 7]), group([2, 7], [2])])
    assert mask.tolist() == [[False, False, False, True], [False, False, False, False]]
    cosines = torch.tensor([[0.4, 0.2, 0.2, 9.0], [0.1, 0.1, 0.1, 0.3]]).masked_fill(mask, -torch.inf)
    row = row_of("3", cosines, cosines, batch=2, size=2)
    assert (row["accuracy"], row["correlation"]) == (0.5, 1.0)
    first = math.log(1 + 2 * math.exp(-1.0))
    second = math.log(3 + math.exp(1.0))
    assert row["nll"]["0.2"] == pytest.approx((first + second) / 2, abs=1e-3)
    assert row["nll"][str(row["best_temperature"])] == min(row["nll"].values())
