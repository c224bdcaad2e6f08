"""A tuned lens: none is none, it reads what a head cannot, it is the same wherever it is fitted, and it is of one teacher."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lead_ds.config import TeacherConfig, load_config
from lead_ds.engine.training.distill import settled
from lead_ds.errors import InputError
from lead_ds.io.shards import save_arrays
from lead_ds.models.lens import Lens, load_lens
from lead_ds.models.load import load_teacher, load_text
from lead_ds.teachers.fit_lens import Fit, Task, fit_settings, fittable, split
from lead_ds.teachers.lens import open_lens
from lead_ds.teachers.states import SHARD_GROUPS, States, shard_paths
from tests.helpers.forked import lead_ds
from tests.helpers.launch import launch
from tests.helpers.rooms import TEACHERS, settings

Configure = Callable[..., Path]
KINDS = ("dual_encoder", "cross_encoder", "llm_reranker")
# As in test_teach: every teacher is compared in its groups, and the student stays as it is.
TRAIN = {"batch_size": 1, "accumulation": 4, "in_batch": "local", "lr": 1e-9, "steps": 3, "save_every": 3}
MISSING = "holds no tuned lens"


@pytest.fixture(scope="module")
def fitted(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each kind: facts of a lens fitted on two processes to a sharded teacher, of one fitted on one process to a whole
    teacher, of the cache that was read through it; and a cross-encoder's losses online and from the cache."""
    folder = tmp_path_factory.mktemp("lenses")

    def write(name: str, tree: dict[str, Any]) -> str:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**tree, "output": str(folder / name)}))
        return str(folder / f"{name}.yaml")

    sharded, own, cached = [], [], []
    losses: dict[str, Any] = {"contrastive": {"scope": "group"}, "layer": {"select": "informative", "k": 1, "every": 1}}
    for kind in KINDS:
        extra = {"lens": "tuned", "placement": "zero3"}
        tree = settings(rooms, folder, kind, extra, train=TRAIN, losses=losses, student={"scale": "cosine"})
        sharded.append(write(f"{kind}-sharded", tree))
        tree["teacher"]["placement"] = "replicate"
        own.append(write(kind, tree))
        cached.append(
            write(f"{kind}-cached", {**tree, "teacher": {"kind": "cached", "path": str(folder / kind / "cache")}})
        )
    both = launch("tests.engine.jobs:lenses", 2, timeout=900, configs=sharded, sharded=True)
    runs = [path for path in (*own, *cached) if "cross_encoder" in path]
    for kind, name, layer in (
        ("dual_encoder", "own-head", {}),
        ("cross_encoder", "at-chance", {"informative_margin": 1.0}),
    ):
        tree = settings(rooms, folder, kind, train=TRAIN, losses={"layer": {**losses["layer"], **layer}})
        if kind == "dual_encoder":  # its first layer tells texts by their words, the others mix them at random
            tree["teacher"]["pooling"] = "mean"
            tree["losses"]["layer"] |= {"teacher_temperature": 0.3, "informative_margin": 0.3}
        runs.append(write(name, tree))
    tree = settings(
        rooms, folder, "cross_encoder", {"lens": "tuned", "lens_path": str(folder / "cross_encoder" / "lens")}
    )
    tree["losses"]["layer"] |= losses["layer"] | {"every": 2}
    tree["train"] |= {"steps": 5, "lr": 0.01}
    resumed = write("resumed", tree)
    jobs = {"configs": own, "cached": cached, "runs": runs, "resumed": resumed}
    [alone] = launch("tests.engine.jobs:through_lenses", 1, timeout=900, **jobs)
    return {"folder": folder, "both": [dict(zip(KINDS, rank, strict=True)) for rank in both], **alone}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lens_does_not_depend_on_ranks_or_placement(fitted: dict[str, Any], kind: str) -> None:
    alone = fitted["layers"][KINDS.index(kind)]
    for rank in fitted["both"]:
        for one, other in zip(alone, rank[kind]["layers"], strict=True):
            assert one["before"]["nll"] == pytest.approx(other["before"]["nll"], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_teacher_and_a_whole_one_say_the_same_through_it(fitted: dict[str, Any], kind: str) -> None:
    for rank in fitted["both"]:
        assert all(rank[kind]["sharded"])
        assert all(rank[kind]["final"]), "a lens must not change the final state"
        assert min(rank[kind]["moved"]) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_what_the_teacher_says_through_it(fitted: dict[str, Any], kind: str) -> None:
    found = fitted["distances"][KINDS.index(kind)]
    assert found["ratio"] <= 1
    assert found["deviation"] > 0.01


def test_a_run_learns_from_informative_layers_online_and_cached(fitted: dict[str, Any]) -> None:
    online, cached = fitted["losses"][:2]
    assert len(online) == len(cached) == TRAIN["steps"], (online, cached)
    np.testing.assert_allclose(online, cached, rtol=5e-3)
    chosen = []
    for name in ("cross_encoder", "cross_encoder-cached"):
        run = fitted["folder"] / name
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        chosen.append([row["layers"]["teacher"] for row in rows if "layers" in row])
        record = load_lens(fitted["folder"] / "cross_encoder" / "lens", "")[1]
        assert json.loads((run / "run.json").read_text())["teacher"]["lens"]["checksum"] == record["checksum"]
    assert chosen[0] == chosen[1]
    assert {layer for layers in chosen[0] for layer in layers} <= {0, 2}


def test_informative_layers_without_a_lens_are_measured_through_the_own_head_or_refused(fitted: dict[str, Any]) -> None:
    own, at_chance = fitted["losses"][2:]
    assert len(own) == TRAIN["steps"], own
    rows = [json.loads(line) for line in (fitted["folder"] / "own-head" / "metrics.jsonl").read_text().splitlines()]
    assert [row["layers"]["teacher"] for row in rows] == [[0]] * TRAIN["steps"]
    assert re.search(
        r"losses\.layer\.k: 1 layers .* 0 of the teacher's are informative .*lead-ds fit-lens", at_chance
    ), at_chance
    assert not (fitted["folder"] / "at-chance").exists()


def test_a_run_through_a_lens_continues_exactly_and_through_the_same_lens_only(fitted: dict[str, Any]) -> None:
    whole, continued, refused = fitted["resumed"]
    assert len(whole) == len(set(whole)) == 5, whole
    assert continued == whole
    assert "files that have changed: teacher: lens" in refused


def test_another_lens_than_the_cache_was_made_through_is_refused(fitted: dict[str, Any]) -> None:
    folder = fitted["folder"]
    path = folder / "cross_encoder-cached.yaml"
    own, other = folder / "cross_encoder" / "lens", folder / "llm_reranker" / "lens"
    config = settled(load_config(path, [f"teacher.lens_path={own}"]))
    assert config.teacher is not None
    assert config.teacher.lens == "tuned"
    with pytest.raises(InputError, match="was not made through the lens in"):
        settled(load_config(path, [f"teacher.lens_path={other}"]))
    with pytest.raises(InputError, match=r"teacher\.lens: is 'head', .* was made with 'tuned'"):
        settled(load_config(path, ["teacher.lens=head"]))


def lens_of(config: Any) -> Any:
    """The lens of a configuration's teacher."""
    return open_lens(config.teacher, config.lens_folder, config.seed)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teacher.max_length=32", r"is the lens of another settings\.max_length"),
        ("teacher.scale=standard", r"is the lens of another settings\.scale"),
        ("teacher.placement=replicate", ""),
        ("teacher.dtype=bf16", ""),
        ("teacher.lens=head", ""),
        ("teacher.lens_path=nowhere", r"nowhere: holds no tuned lens .*lead-ds fit-lens"),
    ],
)
def test_a_lens_of_another_reading_is_refused(fitted: dict[str, Any], override: str, told: str) -> None:
    config = load_config(fitted["folder"] / "cross_encoder.yaml", [override])
    if not told:
        assert (lens_of(config) is None) == ("head" in override)
        return
    with pytest.raises(InputError, match=told):
        lens_of(config)


def test_a_lens_of_another_teacher_and_a_damaged_one_are_refused(
    fitted: dict[str, Any], rooms: Path, tmp_path: Path
) -> None:
    path = fitted["folder"] / "cross_encoder.yaml"
    shutil.copytree(rooms / "cross", tmp_path / "cross")
    weights = tmp_path / "cross" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="is the lens of another checksum"):
        lens_of(load_config(path, [f"teacher.path={tmp_path / 'cross'}"]))
    lens = tmp_path / "lens"
    shutil.copytree(fitted["folder"] / "cross_encoder" / "lens", lens)
    config = load_config(path, [f"teacher.lens_path={lens}"])
    assert lens_of(config) is not None
    good = (lens / "lens.safetensors").read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-1], b""):
        (lens / "lens.safetensors").write_bytes(bad)
        with pytest.raises(InputError, match=r"lens\.safetensors: is damaged"):
            lens_of(config)
    (lens / "lens.json").write_text("{}")
    with pytest.raises(InputError, match=r"lens\.json: cannot be read"):
        lens_of(config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lens_of_nothing_changes_nothing(rooms: Path, kind: str) -> None:
    lengths = {} if "max_length" in TEACHERS[kind] else {"passage_length": 48}
    tree = {**TEACHERS[kind], "path": str(rooms / TEACHERS[kind]["path"]), **lengths}
    config = TeacherConfig.model_validate(tree)
    for dtype in (torch.float32, torch.bfloat16):
        scorer, encoder = load_teacher(config, dtype), load_text(config)
        texts = ["what grinds rock", "which thing hunts"], ["a glacier does", "an octopus hunts crabs at night"]
        tokens = encoder.passages(texts[1]) if kind == "dual_encoder" else encoder.pairs(*texts)
        layers = list(range(scorer.num_layers))
        with torch.no_grad():
            own, final = scorer(tokens=tokens, layers=layers), scorer(tokens=tokens)
            form: Any = "vectors" if kind == "dual_encoder" else "scores"
            scorer.lens = Lens.identity(form, scorer.num_layers, scorer.width, rank=4)
            assert torch.equal(scorer(tokens=tokens, layers=layers).float(), own.float())
            assert torch.equal(scorer(tokens=tokens).float(), final.float())


def test_saved_and_read_again(tmp_path: Path) -> None:
    lens = Lens.identity("vectors", 3, 8, rank=2)
    facts = {"any": "thing"}
    lens.tensors["up_TRD"].normal_()
    lens.save_weights(tmp_path / "lens.safetensors")
    record = {"version": 1, "form": lens.form, "facts": facts, "checksum": lens.checksum(facts)}
    (tmp_path / "lens.json").write_text(json.dumps(record))
    again, _ = load_lens(tmp_path, "")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in lens.tensors.items())
    (tmp_path / "lens.json").write_text(json.dumps({**record, "facts": {"any": "other"}}))
    with pytest.raises(InputError, match="checksum differs"):
        load_lens(tmp_path, "")


G, N, D, SIGNAL = 400, 4, 16, 6


def planted(folder: Path, *, pairs: bool) -> States:
    """States of two layers and a final state: of layer 0 nothing, of layer 1 its head reads the noise, beside which a
    signal stands in some coordinates; the head reads the final state well."""
    rng = np.random.default_rng(0)
    positive = np.arange(G)
    noise = rng.normal(size=(G, N, D))
    truth = np.zeros((G, N))
    truth[:, 0] = 1.5
    if pairs:
        states = np.stack([noise, noise])
        states[1, ..., 0] += truth
        own = np.stack([noise[..., 5], noise[..., 5], truth * 2 + noise[..., 6]])
        arrays = {"states": states.astype(np.float16), "own": own.astype(np.float32)}
    else:
        queries, passages = rng.normal(size=(3, G, D)), np.stack([noise, noise, noise])
        passages[1:, :, 0, :SIGNAL] = queries[1:, :, :SIGNAL] + 0.7 * noise[:, 0, :SIGNAL]
        queries[1, :, SIGNAL:] *= 2
        passages[2, ..., SIGNAL:] = 0
        arrays = {"queries": queries.astype(np.float16), "passages": passages.astype(np.float16)}
    manifest = {
        "facts": {"teacher": {"kind": "cross_encoder" if pairs else "dual_encoder"}, "groups": G},
        "normalize": False,
    }
    for i, path in enumerate(shard_paths(folder, manifest)):
        own = slice(i * SHARD_GROUPS, (i + 1) * SHARD_GROUPS)
        save_arrays(path, {"positive": positive[own], **{name: x[:, own] for name, x in arrays.items()}}, "")
    return States(folder, manifest)


@pytest.mark.parametrize("target", ["labels", "final"])
@pytest.mark.parametrize("pairs", [True, False])
def test_what_a_head_cannot_read_a_lens_does(tmp_path: Path, pairs: bool, target: Any) -> None:
    states = planted(tmp_path, pairs=pairs)
    config = TeacherConfig(kind="cross_encoder" if pairs else "dual_encoder", path="x")
    parts = split(states.positives, 0.2, seed=0)
    fit = Fit(steps=200, lr=0.01, rank=16, target=target)
    task = Task(states, config, 1.0, parts, fit, 0, torch.device("cpu"))
    chance = math.log(N)
    (_, nothing), (_, something) = task.fit_layer(0), task.fit_layer(1)
    assert nothing["after"]["nll"] > chance - 0.05
    assert something["before"]["nll"] > chance - 0.05
    assert something["after"]["nll"] < chance - 0.3
    assert something["after"]["accuracy"] > something["before"]["accuracy"] + 0.15
    assert task.fit_layer(1)[1] == something, "a fit is deterministic"


def test_held_out_groups_share_no_positive() -> None:
    positives = np.repeat(np.arange(50), np.arange(50) % 5 + 1)
    parts = split(positives, 0.2, seed=1)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(positives)))
    found = [set(positives[rows]) for rows in parts.values()]
    assert sum(map(len, found)) == len(set().union(*found)) == 50
    assert len(parts["fit"]) > len(positives) / 2
    assert all(np.array_equal(rows, parts[name]) for name, rows in split(positives, 0.2, seed=1).items())
    with pytest.raises(InputError, match="too few to hold some out"):
        split(np.zeros(100, np.int64), 0.2, seed=1)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teacher.kind=colbert", "one state per text"),
        ("teacher.kind=cached", "cached is no model to run here"),
        ("teacher.train=true teacher.dtype=auto", "changes at every step"),
        ("data.negatives=0", "nothing to compare a positive with"),
    ],
)
def test_no_lens_for_some(configure: Configure, override: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        fittable(load_config(configure(), override.split()))


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"lr": -1.0}, "--lr"), ({"target": "x"}, "--target"), ({"held_out": 0.5}, "--held-out")],
)
def test_settings_that_cannot_be(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        fit_settings(asked)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["teacher.lens=tuned", "teacher.train=true"], "fitted to a frozen teacher"),
        (["teacher.lens=tuned", "teacher.kind=colbert"], "colbert has one per token"),
        (["losses.layer.select=informative", "teacher.train=true"], "measured once, of a frozen teacher"),
    ],
)
def test_configurations_that_cannot_be(configure: Configure, overrides: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_config(configure(), overrides)


def test_bad_input_on_the_command_line(configure: Configure) -> None:
    path = configure("run", "cross_encoder", extra_teacher={"lens": "tuned"})
    for arguments, told in (
        (
            ["distill", str(path)],
            f"error: {path.parent / 'run' / 'lens'}: {MISSING} (fit one: lead-ds fit-lens CONFIG",
        ),
        (
            ["teach", str(path), "--fit-lens", "--lens-steps", "5"],
            "error: teach --fit-lens: is a command of its own now (lead-ds fit-lens CONFIG",
        ),
    ):
        done = lead_ds(*arguments)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(told), done.stderr
        assert not (path.parent / "run").exists()
