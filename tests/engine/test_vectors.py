"""Distilling from cached vectors is distilling from the dual encoder itself, over the whole batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught.vectors import Listing, VectorCache, vector_arrays
from lead_ds.engine.training.distill import settled
from lead_ds.errors import InputError
from lead_ds.io.shards import mapped
from lead_ds.losses import Depths
from lead_ds.teachers.cached import CachedTeacher, open_cache
from lead_ds.teachers.shards import layers_to_keep
from lead_ds.teachers.teach import teachable
from lead_ds.teachers.teacher import Lesson
from tests.engine.test_teach import ALONE
from tests.helpers.forked import lead_ds
from tests.helpers.launch import launch
from tests.helpers.rooms import settings

# Such a small learning rate that the student stays as it is: the losses of all steps are those of one student.
TRAIN = {"batch_size": 4, "accumulation": 2, "lr": 1e-9, "steps": 4, "save_every": 4}
SECTIONS: dict[str, Any] = {
    "train": TRAIN,
    "student": {"scale": "cosine"},
    "losses": {
        "margin_mse": {"weight": 0.1},
        "embedding": {"weight": 0.1},
        "layer": {"select": "random", "k": 2, "every": 1, "layer_temperature": 1.0},
    },
}


@dataclass
class Kept:
    """A dual encoder's vectors, and what training with them and with the encoder itself gave."""

    folder: Path
    found: dict[str, Any]
    losses: dict[str, list[float]]
    on_two: dict[str, list[float]]

    def config(self, *overrides: str, cache: str = "some") -> Any:
        """A configuration that reads a cache, as a run resolves it."""
        given = [f"teacher.path={self.folder / cache}", *overrides]
        return settled(load_config(self.folder / "exact.yaml", given))


def opened(config: Any) -> CachedTeacher:
    """The teacher of a configuration."""
    cache = open_cache(Lesson.of(config), open_groups(config.data), ALONE)
    return CachedTeacher(cache, config.teacher, ALONE.device)


@pytest.fixture(scope="module")
def kept(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("vectors")

    def write(name: str, cache: str | None, **changes: Any) -> str:
        tree = settings(rooms, folder / f"run-{name}", "dual_encoder", **{**SECTIONS, **changes})
        if cache:
            tree["teacher"] = {"kind": "cached", "path": str(folder / cache)}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    given = {
        **SECTIONS["losses"],
        "layer": {"select": "given", "teacher_layers": [1, 3], "student_layers": [0, 2]},
    }
    runs = {
        "online": write("online", None),
        "exact": write("exact", "exact"),
        "rounded": write("rounded", "rounded"),
        "online given": write("online-given", None, losses=given),
        "given": write("given", "some", losses=given),
    }
    job = "tests.engine.vector_jobs:{}".format
    [found] = launch(
        job("taught_and_distilled"), 1, online=runs["online"], folder=str(folder), runs=list(runs.values())
    )
    two = {"train": {**TRAIN, "batch_size": 2}}
    pair = {"online": write("online-2", None, **two), "exact": write("exact-2", "exact-2", **two)}
    tree = yaml.safe_load((folder / "online-2.yaml").read_text())
    tree["teacher"]["placement"] = "zero3"
    (folder / "sharded.yaml").write_text(yaml.safe_dump(tree))
    sharded = launch(
        job("on_two_ranks"),
        2,
        online=str(folder / "sharded.yaml"),
        folder=str(folder / "exact-2"),
        runs=list(pair.values()),
    )
    return Kept(
        folder,
        found,
        dict(zip(runs, found["losses"], strict=True)),
        dict(zip(pair, sharded[0]["losses"], strict=True)),
    )


def test_vectors_are_the_teachers(kept: Kept) -> None:
    assert kept.found["layers"] == {"exact": [0, 1, 2, 3, 4], "rounded": [0, 1, 2, 3, 4], "some": [1, 3]}
    exact, rounded, some = (kept.found["distances"][name] for name in ("exact", "rounded", "some"))
    assert exact["relative"] < 1e-5
    # A float16 is off by 2^-11 of itself at most, a deviation therefore by 2^-11 of its length.
    for distance in (rounded, some):
        assert 1e-5 < distance["relative"] <= 2**-11 * distance["deviation"] + 1e-5
        assert 0.01 < distance["roundings"] <= 1


def test_each_text_is_kept_once(kept: Kept) -> None:
    data = load_config(kept.folder / "online.yaml").data
    groups = open_groups(data)
    lines = [json.loads(line) for line in (Path(data.path) / data.train).read_text().splitlines()]
    listed = {name for line in lines for name in (*line["positives"], *line["negatives"])}
    assert kept.found["counts"] == [len(groups), len(listed)]
    cache = VectorCache.open(kept.folder / "some")
    stored = {
        kind: sum(len(mapped(p)[0]["deviation"]) for p in cache.paths if p.name.startswith(kind))
        for kind in ("queries", "passages")
    }
    assert stored == {"queries": len(groups), "passages": len(listed)}


def test_losses_are_those_of_the_teacher_itself(kept: Kept) -> None:
    losses = kept.losses
    np.testing.assert_allclose(losses["exact"], losses["online"], rtol=1e-5)
    assert len(set(losses["online"])) == len(losses["online"]) == 4
    # Cosines t of the teacher and s of the student lie in [-1, 1]: |log t/s| <= R = 4. Where cosines are off by e at most, a
    # KL moves by 2 e R, the layers' weights, a softmax of -NLL / 1, change their sum by 4 e R, and a tenth of a squared
    # margin by 0.1 * 2 * 4 * 2 e.
    for name, other, cache in (("rounded", "online", "rounded"), ("given", "online given", "some")):
        off = kept.found["distances"][cache]["cosine"]
        assert 0 < off <= 4 * kept.found["distances"][cache]["relative"]
        np.testing.assert_allclose(losses[name], losses[other], atol=off * (4 * (2 + 2 + 4) + 1.6), rtol=1e-5)


def test_the_whole_batch_is_compared_on_any_number_of_ranks(kept: Kept) -> None:
    np.testing.assert_allclose(kept.on_two["exact"], kept.on_two["online"], rtol=1e-5)
    np.testing.assert_allclose(kept.on_two["exact"], kept.losses["exact"], rtol=1e-5)
    # The batch holds 4 queries with 3 passages each: in its group alone a query's response would be another.
    one, other = VectorCache.open(kept.folder / "exact"), VectorCache.open(kept.folder / "exact-2")
    assert [path.name for path in one.paths] == [path.name for path in other.paths]
    for ours, theirs in zip(one.paths, other.paths, strict=True):
        (a, _), (b, _) = mapped(ours), mapped(theirs)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_only_lost_and_spoilt_files_are_made_anew(kept: Kept) -> None:
    assert kept.found["anew"] == ["index.safetensors", "queries-00000.safetensors", "passages-00001.safetensors"]


def test_run_facts_say_what_is_compared(kept: Kept) -> None:
    teacher = json.loads((kept.folder / "run-given" / "run.json").read_text())["teacher"]
    assert (teacher["vectors_of_layers"], teacher["layers"], teacher["parameter_bytes"]) == ([1, 3], 5, 0)
    config = kept.config()
    told = opened(config).describe()
    assert "vectors of layers 1, 3 and the final state" in told
    assert told.endswith("compares a query with every passage of the batch")
    assert [row["layers"] for row in kept.found["measured"]] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [1, 3]]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["losses.layer.k=2"], ""),  # random: drawn among the two that are stored
        (["losses.layer.k=3"], r"losses\.layer\.k: 3 layers are to be selected at random, the cache holds 2: 1, 3"),
        (
            ["losses.layer.select=last", "losses.layer.k=2"],
            r"losses\.layer\.select: reads layer 4, .* holds layers 1, 3",
        ),
        (["losses.layer.select=skip", "losses.layer.k=1"], "reads layer 4"),
        (
            ["losses.layer.select=given", "losses.layer.teacher_layers=[2]", "losses.layer.student_layers=[1]"],
            r"teacher_layers: reads layer 2, the cache holds layers 1, 3 \(store more: lead-ds teach CONFIG --vectors",
        ),
        (["teacher.scale=none"], ""),  # taken when vectors are read
        (["teacher.scale=standard"], ""),
        (["teacher.normalize=true"], r"teacher\.normalize: is True, .* was made with None"),
        (["data.negatives=8"], "lists 7 negatives, 8 are drawn"),
        (["losses.attention.weight=1"], "no attention maps"),
    ],
)
def test_what_vectors_can_and_cannot_give(kept: Kept, overrides: list[str], told: str) -> None:
    def begin() -> None:
        config = kept.config(*overrides)
        teacher = opened(config)
        config.losses.pairs(Depths(teacher.num_layers, 3, config.seed, readable=teacher.readable), step=0)

    if not told:
        begin()
        return
    with pytest.raises(InputError, match=told):
        begin()


def test_layers_are_named_in_several_ways(kept: Kept) -> None:
    def chosen(asked: str, *overrides: str) -> list[int]:
        return layers_to_keep(load_config(kept.folder / "online.yaml", overrides), asked)

    assert chosen("3,1") == [1, 3]
    assert chosen("last:2") == [3, 4]
    assert chosen("all") == chosen("auto") == [0, 1, 2, 3, 4]
    assert chosen("final") == chosen("auto", "losses.layer.weight=0", "student.scale=none") == []
    assert chosen("auto", "losses.layer.select=last") == [3, 4]
    given = ["losses.layer.select=given", "losses.layer.teacher_layers=[2,0]", "losses.layer.student_layers=[9,1]"]
    assert chosen("auto", *given) == [0, 2]
    for asked in ("5", "last:6", "last:0", "-1", "some", "1,,2", ""):
        with pytest.raises(InputError, match="--vectors"):
            chosen(asked)


@pytest.mark.parametrize("kind", ["colbert", "cross_encoder", "llm_reranker"])
def test_other_teachers_have_no_vectors(rooms: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(rooms, tmp_path / "run", kind)))
    teachable(load_config(path))
    with pytest.raises(InputError, match=f"--vectors: a teacher of kind {kind} "):
        teachable(load_config(path), vectors=True)


def test_refusals_end_with_status_2_and_change_nothing(kept: Kept) -> None:
    """Relevance into a folder of vectors: the folder is another cache's."""
    before = sorted(path.name for path in (kept.folder / "some").iterdir())
    done = lead_ds("teach", kept.folder / "online.yaml", "--out", kept.folder / "some")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {kept.folder / 'some'}: holds a teacher's vectors, not relevance"
    )
    assert sorted(path.name for path in (kept.folder / "some").iterdir()) == before


def test_rows_of_an_index_are_distinct_texts() -> None:
    listing = Listing([(7, np.array([5, 2])), (3, np.array([2, 9])), (7, np.array([9, 1]))])
    assert (listing.read_by(1), listing.read_by(2), listing.read_by(3)) == (6, 5, 4)
    index = listing.index()
    assert {name: array.tolist() for name, array in index.items()} == {
        "queries": [1, 0, 1],
        "query_groups": [1, 0],
        "passages": [1, 2, 5, 9],
        "passage_groups": [2, 0, 0, 1],
    }


def test_vectors_that_float16_cannot_hold_are_refused() -> None:
    vectors = np.zeros((2, 1, 3), np.float32)
    assert vector_arrays(vectors + 1e6)["mean"].tolist() == [[1e6] * 3]
    vectors[0] = 1e6
    for broken in (vectors, np.full_like(vectors, np.nan)):
        with pytest.raises(ValueError, match=r"beyond what float16 holds|not finite"):
            vector_arrays(broken)
