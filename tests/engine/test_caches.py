"""Caches of texts alone and of mixtures teach what the teacher does; relevance is kept by reading each text once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.data.taught.relevance import RelevanceCache
from lead_ds.data.taught.vectors import VectorCache
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError, RunError
from lead_ds.io.shards import mapped
from lead_ds.teachers import shards
from lead_ds.teachers.fit_lens import Fit, fit_lens
from lead_ds.teachers.frozen import FrozenTeacher
from lead_ds.teachers.teach import teach
from tests.engine import test_alone
from tests.engine.jobs import losses_of
from tests.helpers.rooms import settings


def cached_run(path: Path, cache: Path, name: str, **sections: Any) -> Path:
    """The run of a configuration, with a cache in place of its teacher."""
    tree = yaml.safe_load(path.read_text())
    tree |= {"teacher": {"kind": "cached", "path": str(cache)}, "output": str(path.parent / name), **sections}
    changed = path.with_name(f"{name}.yaml")
    changed.write_text(yaml.safe_dump(tree))
    return changed


def test_texts_alone_are_taught_from_a_cache(rooms: Path, tmp_path: Path) -> None:
    losses = {**test_alone.LOSSES, "similarity": {"weight": 1.0}}
    path = test_alone.write(rooms, tmp_path, "online", losses=losses, train={"evaluate_every": 0})
    texts = rooms / "data" / "alone"
    shared = (texts / "corpus.txt").read_text().splitlines()[0]
    both = tmp_path / "data" / "both"
    shutil.copytree(texts, both)
    with (both / "queries.txt").open("a") as file:
        file.write(f"\n{shared}\n{shared}")  # as a passage, and twice as a query
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= {"path": str(tmp_path / "data"), "train": "both"}
    tree["teacher"]["query_prompt"] = "say: "
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path, ["evaluation.split=null"])
    with pytest.raises(InputError, match="texts alone: relevance is of a query and its passages"):
        teach(config, tmp_path / "cache", quiet=True)
    with pytest.raises(InputError, match="holds texts alone: a lens is fitted to groups"):
        fit_lens(load_config(path, ["data.negatives=2"]), tmp_path / "lens", Fit(), quiet=True)
    cache = teach(config, tmp_path / "cache", vectors="final", stored="float32", shard_size=20, quiet=True)
    assert isinstance(cache, VectorCache)
    lines = [(file.name, line) for file in both.iterdir() for line in file.read_text().splitlines()]
    assert len(cache) == len(lines)
    assert (cache.manifest["queries"], cache.manifest["passages"]) == (0, len(set(lines)))

    before = {file.name: file.stat().st_mtime_ns for file in cache.paths}
    third = [*cache.paths][2]
    third.unlink()
    teach(config, tmp_path / "cache", vectors="final", stored="float32", quiet=True)
    anew = [file.name for file in cache.paths if file.stat().st_mtime_ns != before[file.name]]
    assert anew == [third.name]

    distill(config, quiet=True)
    distill(load_config(cached_run(path, cache.folder, "cached"), ["evaluation.split=null"]), quiet=True)
    np.testing.assert_allclose(losses_of(tmp_path / "cached"), losses_of(tmp_path / "online"), rtol=1e-5)
    (both / "queries.txt").write_text("another")
    with pytest.raises(InputError, match=r"was made of other data: train: queries\.txt"):
        distill(load_config(cached_run(path, cache.folder, "changed")), quiet=True)


def mixture(rooms: Path, folder: Path, **sections: Any) -> Path:
    """A run on two sets that share their texts, the second with prompts of its own."""
    other = folder / "other"
    shutil.copytree(rooms / "data", other, dirs_exist_ok=True)
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(lines[: len(lines) // 3]))
    train = {"steps": 3, "batch_size": 1, "accumulation": 4, "in_batch": "local", "evaluate_every": 0}
    prompts = {"query": "say: ", "passage": "read: "}
    data = {"sets": [{"path": str(rooms / "data")}, {"path": str(other), "prompts": prompts}], "negatives": 2}
    tree = settings(rooms, folder / "online", train=train, evaluation={"split": None}, **sections)
    tree["data"] = data
    path = folder / "online.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_mixture_is_taught_from_a_cache(rooms: Path, tmp_path: Path) -> None:
    losses = {"layer": {"weight": 0.0}}
    path = mixture(rooms, tmp_path, losses=losses)
    distill(load_config(path), quiet=True)
    for name, vectors in (("relevance", None), ("vectors", "final")):
        kept: Any = {"vectors": vectors, "stored": "float32"} if vectors else {}
        cache = teach(load_config(path), tmp_path / "caches" / name, quiet=True, **kept)
        distill(load_config(cached_run(path, cache.folder, name)), quiet=True)
        off = 0.0 if vectors else 2**-11  # relevance is kept in float16: deviations below 2 are off by so much at most
        np.testing.assert_allclose(losses_of(tmp_path / name), losses_of(tmp_path / "online"), rtol=1e-5, atol=off)
    changed = yaml.safe_load(path.read_text())["data"]
    changed["sets"][1]["prompts"]["query"] = "tell: "
    with pytest.raises(InputError, match="was made of other data: sets"):
        distill(load_config(cached_run(path, cache.folder, "changed", data=changed)), quiet=True)
    changed["sets"].reverse()
    with pytest.raises(InputError, match="was made of other data: sets"):
        distill(load_config(cached_run(path, cache.folder, "changed", data=changed)), quiet=True)


def test_random_negatives_of_a_mixture_are_cached_by_the_epochs_of_each_set(rooms: Path, tmp_path: Path) -> None:
    path = mixture(rooms, tmp_path, losses={"layer": {"weight": 0.0}})
    more = ["data.negatives=8"]  # 7 are listed
    distill(load_config(path, more), quiet=True)
    cache = teach(load_config(path, more), tmp_path / "cache", vectors="final", stored="float32", quiet=True)
    assert cache.manifest["facts"]["draws"]["epochs"] == [1, 1]
    distill(load_config(cached_run(path, cache.folder, "cached"), more), quiet=True)
    np.testing.assert_allclose(losses_of(tmp_path / "cached"), losses_of(tmp_path / "online"), rtol=1e-5)
    with pytest.raises(InputError, match=r"with epochs \[.*\], the cache holds those of epochs"):
        distill(load_config(cached_run(path, cache.folder, "longer"), [*more, "train.steps=9999"]), quiet=True)


def test_relevance_is_kept_by_reading_each_text_once(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(rooms, tmp_path / "run", extra_teacher={"batch_size": 1})))
    config, reads = load_config(path), 0
    read = FrozenTeacher.read

    def counted(self: FrozenTeacher, tokens: Any, layers: Any) -> Any:
        nonlocal reads
        reads += len(tokens["input_ids"])
        return read(self, tokens, layers)

    monkeypatch.setattr(FrozenTeacher, "read", counted)
    monkeypatch.setattr(shards, "_REPEATED", 1e9)
    again = teach(config, tmp_path / "again", shard_size=7, quiet=True)
    by_shard, reads = reads, 0
    monkeypatch.setattr(shards, "_REPEATED", 1.02)

    wrote, save = 0, shards.Shards.save

    def killed(self: Any, *of: Any) -> None:
        nonlocal wrote
        wrote += 1
        if wrote == 5:
            raise RunError("disk", "is full", "make room")
        save(self, *of)

    monkeypatch.setattr(shards.Shards, "save", killed)
    with pytest.raises(RunError, match="is full"):
        teach(config, tmp_path / "once", shard_size=7, quiet=True)
    monkeypatch.setattr(shards, "_OF_DISK", 0.0)  # a disk that is fuller by now changes nothing
    once = teach(config, tmp_path / "once", shard_size=7, quiet=True)
    lines = [json.loads(line) for line in (rooms / "data" / "train.jsonl").read_text().splitlines()]
    texts = {name for line in lines for name in (*line["positives"], *line["negatives"])}
    lost = reads - len(lines) - len(texts)  # the shard whose file was not written
    assert 0 < lost <= len(texts) // 4 + 1
    assert reads < by_shard
    assert sorted(file.name for file in once.folder.iterdir()) == sorted(file.name for file in again.folder.iterdir())
    assert isinstance(once, RelevanceCache)
    for ours, theirs in zip(once.paths, again.paths, strict=True):
        (a, _), (b, _) = mapped(ours), mapped(theirs)
        np.testing.assert_array_equal(a["keys"], b["keys"])
        np.testing.assert_allclose(a["mean"], b["mean"], atol=1e-5)
        np.testing.assert_allclose(a["deviation"], b["deviation"], atol=1e-5, rtol=2**-10)
