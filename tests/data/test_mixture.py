"""Mixtures: shares by size and weight, sets mixed or apart, each gone through in turn, the same however often it is begun."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lead_ds.config import Config
from lead_ds.data.batches import Batches
from lead_ds.data.groups.mixture import MixedGroups, Sampling
from lead_ds.data.groups.open import open_groups
from lead_ds.data.groups.shuffle import shuffled
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.settings.data import DataConfig
from tests.helpers.batches import windows_of
from tests.helpers.rooms import settings


def write(folder: Path, count: int) -> str:
    """A set of groups that list their texts, each with a name that says which it is of."""
    folder.mkdir()
    rows = [
        {
            "query": f"{folder.name} {row}",
            "positives": [f"p{row} {folder.name}"],
            "negatives": [f"n{row} {folder.name}"],
        }
        for row in range(count)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def data(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    sets = [
        {"path": write(tmp_path / "small", 8), "prompts": {"query": "ask: "}},
        {"path": write(tmp_path / "large", 24), "weight": 1.0},
    ]
    return {"sets": sets, "negatives": 1, **settings}


def test_a_permutation_that_is_never_held() -> None:
    for count in (1, 2, 3, 17, 1000):
        orders = [[shuffled(place, count, seed) for place in range(count)] for seed in range(2)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        assert count < 17 or orders[0] != orders[1]
    places = [shuffled(place, 1 << 40, 7) for place in range(1000)]
    assert len(set(places)) == 1000
    assert 0.4 < sum(places) / 1000 / (1 << 40) < 0.6


@pytest.mark.parametrize(("alpha", "share"), [(1.0, 0.75), (0.5, 0.634), (0.0, 0.5)])
def test_shares_go_by_size_to_the_power_of_alpha(alpha: float, share: float) -> None:
    sampling = Sampling([100, 300], [1.0, 1.0], alpha)
    drawn = [sampling.of(n, seed=1) for n in range(2 * sampling.cycle)]
    found = Counter(at for at, _ in drawn)
    assert found[1] / len(drawn) == pytest.approx(share, abs=1e-3)
    assert [before for at, before in drawn if at == 0] == list(range(found[0]))
    assert abs(sum(at for at, _ in drawn[:400]) / 400 - share) < 0.1, "spread over the cycle"


def test_every_set_is_gone_through_and_its_texts_are_its_own(tmp_path: Path) -> None:
    config = DataConfig.model_validate(data(tmp_path))
    groups = open_groups(config)
    assert isinstance(groups, MixedGroups)
    drawn = groups.drawn(range(32), seed=0, together=4)
    rows = [row for row, epoch in drawn if epoch == 0]
    assert len(set(rows)) == len(rows)
    assert drawn == pickle.loads(pickle.dumps(groups)).drawn(range(32), seed=0, together=4)
    one, other = groups.draw(0, 0, 0), groups.draw(8, 0, 0)
    assert one.query == "ask: small 0"
    assert other.query == "large 0"
    assert not set(one.keys.tolist()) & set(other.keys.tolist())
    assert groups.where(9) == f"{tmp_path / 'large' / 'train.jsonl'}:2"


@pytest.mark.parametrize("batches", ["mixed", "apart"])
def test_two_processes_see_what_one_sees(rooms: Path, tmp_path: Path, batches: str) -> None:
    mixture = data(tmp_path, batches=batches, alpha=0.5)

    def windows(world: int) -> list[Batches]:
        train = {"batch_size": 4 // world, "accumulation": 2}
        config = Config.model_validate({**settings(rooms, tmp_path / "run", train=train), "data": mixture})
        return [windows_of(config, Ranks(rank, rank, world, torch.device("cpu"))) for rank in range(world)]

    [whole], parts = windows(1), windows(2)
    for step in range(3):
        keys = whole.window(step).passage_keys.view(2, 2, -1)
        for rank, part in enumerate(parts):
            assert torch.equal(keys[:, rank], part.window(step).passage_keys.view(2, -1))
    micros = [[int(row) < 8 for row in micro] for step in range(6) for micro in whole.rows(step).reshape(2, 4)]
    assert any(len(set(micro)) == 2 for micro in micros) == (batches == "mixed")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": "other.jsonl"}, "train is ignored beside sets"),
        ({"token_cache": True}, "token_cache is of one set"),
        ({"sets": []}, "path"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DataConfig.model_validate({**data(tmp_path), **change})
    with pytest.raises(ValidationError, match="ignored without sets"):
        DataConfig(path="x", alpha=0.5)


def test_sets_are_of_one_sort(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "texts.txt").write_text("a text\n")
    tree = data(tmp_path)
    tree["sets"].append({"path": str(tmp_path / "alone"), "train": "texts.txt", "format": "texts"})
    with pytest.raises(InputError, match="some sets hold groups, some hold texts alone"):
        open_groups(DataConfig.model_validate(tree))
