"""A schedule of negatives: from low scores to high over the steps, the same wherever a run begins, refused without scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lead_ds.config import Config
from lead_ds.data.groups.open import open_groups
from lead_ds.data.groups.rows import RowGroups
from lead_ds.data.groups.schedule import scheduled
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.settings.data import DataConfig
from tests.helpers.batches import ALONE, windows_of
from tests.helpers.rooms import settings
from tests.helpers.tiny import tiny_dataset

STEPS = 9


def listed(folder: Path) -> list[dict[str, Any]]:
    """The groups of a folder of ids, with the ids as texts."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        names = [*row["positives"], *row["negatives"]]
        row |= {"query": row["query_id"], "scores": [row["scores"][name] for name in names]}
        del row["query_id"]
    return rows


@pytest.mark.parametrize("store", ["ids", "texts"])
def test_from_low_scores_to_high(store: str, tmp_path: Path, rooms: Path) -> None:
    folder = tiny_dataset(tmp_path / "data", scores=True)
    data = DataConfig(path=str(folder), negatives=2, schedule="easy_to_hard")
    groups = scheduled(data, open_groups(data) if store == "ids" else RowGroups.of(listed(folder), 2))
    ranks = {}
    for at in (0.0, 0.5, 1.0):
        found = []
        for row, line in enumerate(listed(folder)):
            order = np.sort(np.array(line["scores"][1:], np.float32)).tolist()
            for epoch in range(8):
                drawn = groups.draw(row, 0, epoch, at)
                found += [order.index(score) for score in drawn.scores[1:]]
        ranks[at] = set(found)
    assert ranks == {0.0: {0, 1, 2, 3}, 0.5: {2, 3, 4, 5}, 1.0: {3, 4, 5, 6}}


def test_a_step_has_its_place_in_the_schedule(tmp_path: Path, rooms: Path) -> None:
    data = {"path": str(tiny_dataset(tmp_path / "data", scores=True)), "negatives": 2, "schedule": "easy_to_hard"}
    train = {"steps": STEPS, "batch_size": 4}
    config = Config.model_validate(settings(rooms, tmp_path / "run", data=data, train=train))
    half = Config.model_validate(settings(rooms, tmp_path / "run", data=data, train={**train, "batch_size": 2}))
    groups = scheduled(config.data, open_groups(config.data))
    batches = windows_of(config, ALONE, groups)
    shares = [windows_of(half, Ranks(rank, rank, 2, torch.device("cpu")), groups) for rank in range(2)]
    for step in (0, STEPS - 1):
        window = batches.window(step)
        drawn = [(batches.rows(step)[i], window.passage_ids[3 * i : 3 * i + 3]) for i in range(4)]
        for row, names in drawn:
            at = 0.0 if step == 0 else 1.0
            assert names == groups.draw(int(row), config.seed, window.epoch, at).passage_ids
        assert [name for share in shares for name in share.window(step).passage_ids] == window.passage_ids


def test_what_cannot_be_ordered_is_refused(tmp_path: Path) -> None:
    plain, scored = tiny_dataset(tmp_path / "plain"), tiny_dataset(tmp_path / "scored", scores=True)
    for folder, negatives, told in (
        (plain, 2, "orders negatives by their scores, and .*train.jsonl has none"),
        (scored, 7, "orders nothing: no group of .* has more than 7"),
        (scored, 8, "7 negatives have a score, 8 are drawn"),
    ):
        data = DataConfig(path=str(folder), negatives=negatives, schedule="easy_to_hard")
        with pytest.raises(InputError, match=told):
            scheduled(data, open_groups(data))
    with pytest.raises(ValidationError, match="schedule is ignored without negatives"):
        DataConfig(path=str(scored), negatives=0, schedule="easy_to_hard")
