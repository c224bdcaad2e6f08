"""A cached teacher teaches what the teacher itself does; a cache outlives a kill, and refuses what it was not made for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lead_ds.config import load_config
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught.relevance import RelevanceCache, shard_path
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.distill import settled
from lead_ds.errors import InputError
from lead_ds.io.shards import mapped
from lead_ds.teachers.cached import open_cache
from lead_ds.teachers.teacher import Lesson
from tests.helpers.forked import lead_ds
from tests.helpers.launch import ROOT, launch
from tests.helpers.rooms import TEACHERS, settings

Configure = Callable[..., Path]
ALONE = Ranks(0, 0, 1, torch.device("cpu"))

# One query a micro-batch: then the batch's passages are the query's own, and every teacher is compared in its groups.
# Such a small learning rate that the student stays as it is: the losses of all steps are those of one student.
TRAIN = {"batch_size": 1, "accumulation": 4, "in_batch": "local", "lr": 1e-9, "steps": 4, "save_every": 4}
LOSSES = {"margin_mse": {"weight": 0.1}}
SELECT = {
    "dual_encoder": {"select": "random", "k": 2, "every": 2},
    "colbert": {"select": "last", "k": 2},
    "cross_encoder": {"select": "skip", "k": 3},
    "llm_reranker": {"select": "given", "teacher_layers": [0, 2], "student_layers": [1, 2]},
}
EXTRA: dict[str, Any] = {"cross_encoder": {"scale": "standard"}}


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@dataclass
class Taught:
    """Four teachers' caches, and what training with them and with the teachers themselves gave."""

    folder: Path
    losses: dict[str, tuple[list[float], list[float]]]  # online, cached
    distances: dict[str, dict[str, float]]

    def config(self, kind: str) -> Path:
        """A configuration that reads a cache."""
        return self.folder / f"{kind}-cached.yaml"

    def cache(self, kind: str) -> Path:
        """A cache."""
        return self.folder / f"{kind}-teach" / "cache"


@pytest.fixture(scope="module")
def taught(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("taught")
    teach, pairs = [], []
    for kind in TEACHERS:
        losses = {**LOSSES, "layer": {"layer_temperature": 1.0, **SELECT[kind]}}
        sections: dict[str, Any] = {"train": TRAIN, "losses": losses, "student": {"scale": "cosine"}}
        tree = settings(rooms, folder / f"{kind}-online", kind, EXTRA.get(kind), **sections)
        online = write(folder / f"{kind}-online.yaml", tree)
        teach.append(write(folder / f"{kind}-teach.yaml", {**tree, "output": str(folder / f"{kind}-teach")}))
        teacher = {"kind": "cached", "path": str(folder / f"{kind}-teach" / "cache")}
        tree = {**tree, "teacher": teacher, "output": str(folder / f"{kind}-cached")}
        pairs.append([online, write(folder / f"{kind}-cached.yaml", tree)])
    job = "tests.engine.jobs:{}".format
    assert launch(job("teach_each"), 1, configs=teach, shard_size=7) == [[5, 6, 4, 3]]
    [losses_of_all] = launch(job("distil_each"), 1, configs=[path for pair in pairs for path in pair])
    [distances] = launch(job("cached_and_online"), 1, pairs=pairs)
    losses = {kind: (losses_of_all[2 * i], losses_of_all[2 * i + 1]) for i, kind in enumerate(TEACHERS)}
    return Taught(folder, losses, dict(zip(TEACHERS, distances, strict=True)))


@pytest.mark.parametrize("kind", TEACHERS)
def test_relevance_is_the_teachers_to_half_precision(taught: Taught, kind: str) -> None:
    assert taught.distances[kind]["ratio"] <= 1
    assert taught.distances[kind]["deviation"] > 0.01


@pytest.mark.parametrize("kind", TEACHERS)
def test_losses_are_those_of_the_teacher_itself(taught: Taught, kind: str) -> None:
    online, cached = taught.losses[kind]
    assert len(online) == len(cached) == 4
    # Stored deviations d <= D are off by u d, u = 2^-11, teacher logits by as much. The student's cosines lie in [-1, 1], so
    # that |log t/s| <= R = 2 D + 2. dKL/dt_j = t_j (log t_j/s_j - KL): a KL moves by 2 u D R at most, the layers' weights,
    # a softmax of -NLL / 1, change their sum by 4 u D R, and a tenth of a squared margin by 0.4 u D R.
    deviation = taught.distances[kind]["deviation"]
    bound = 2**-11 * deviation * (2 * deviation + 2) * (2 + 2 + 4 + 0.4)
    np.testing.assert_allclose(cached, online, atol=bound, rtol=1e-6)
    assert len(set(online)) == 4


def test_run_facts_and_student_name_the_teacher(taught: Taught) -> None:
    run = taught.folder / "cross_encoder-cached"
    teacher = json.loads((run / "run.json").read_text())["teacher"]
    assert teacher["placement"] == "cached"
    assert teacher["kind"] == "cross_encoder"
    assert teacher["parameter_bytes"] == 0
    assert "from `cross` (cross encoder)" in (run / "student" / "README.md").read_text()
    assert load_config(run / "config.yaml").teacher.max_length == 64  # type: ignore[union-attr]


def test_two_processes_and_a_sharded_teacher_change_nothing(
    taught: Taught, configure: Configure, rooms: Path, tmp_path: Path
) -> None:
    kinds = ["dual_encoder", "colbert", "cross_encoder"]
    configs = [
        str(configure(kind, kind, extra_teacher={**EXTRA.get(kind, {}), "placement": "zero3"}, train=TRAIN))
        for kind in kinds
    ]
    launch("tests.engine.jobs:teach_each", 2, configs=configs, shard_size=7)
    for kind in kinds:
        ours, theirs = RelevanceCache.open(tmp_path / kind / "cache"), RelevanceCache.open(taught.cache(kind))
        assert ours.files == theirs.files == 5
        for shard in range(ours.files):
            (a, _), (b, _) = mapped(shard_path(ours.folder, shard)), mapped(shard_path(theirs.folder, shard))
            np.testing.assert_array_equal(a["keys"], b["keys"])
            np.testing.assert_allclose(a["mean"], b["mean"], atol=1e-5)
            np.testing.assert_allclose(a["deviation"], b["deviation"], atol=1e-5, rtol=2**-10)
    # The contrastive loss over the group: otherwise a query of one process would be compared with fewer passages.
    sections: dict[str, Any] = {
        "losses": {"contrastive": {"scope": "group"}},
        "train": {"batch_size": 2, "steps": 4, "save_every": 4},
    }
    both = configure("both", "cross_encoder", **sections)
    one = configure("one", "cross_encoder", **{**sections, "train": {**sections["train"], "batch_size": 4}})
    for path in (both, one):
        tree = yaml.safe_load(path.read_text())
        write(path, {**tree, "teacher": {"kind": "cached", "path": str(tmp_path / "cross_encoder" / "cache")}})
    [first, _] = launch("tests.engine.jobs:distil_each", 2, configs=[str(both)])
    [alone] = launch("tests.engine.jobs:distil_each", 1, configs=[str(one)])
    np.testing.assert_allclose(first[0], alone[0], rtol=1e-5)


def test_killed_and_continued(taught: Taught, configure: Configure, tmp_path: Path) -> None:
    config = configure("killed", "cross_encoder", extra_teacher={"batch_size": 1}, train=TRAIN)
    out = tmp_path / "cache"
    command = [sys.executable, "-m", "lead_ds", "teach", str(config), "--out", str(out), "--shard-groups", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.glob("relevance-*")}

    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + 600
        while len(finished()) < 3:
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(run.pid, signal.SIGKILL)
    before = finished()
    assert 3 <= len(before) < 30
    with pytest.raises(InputError, match="shards are missing"):
        RelevanceCache.open(out)
    spoilt = shard_path(out, 1)
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"{spoilt.name} is damaged (cut short)" in done.stderr
    after = finished()
    kept = [name for name, changed in before.items() if after[name] == changed]
    assert sorted(kept) == sorted(set(before) - {spoilt.name})
    ours, theirs = RelevanceCache.open(out), RelevanceCache.open(taught.cache("cross_encoder"))
    for row in range(len(ours)):
        keys = [mapped(shard_path(out, row))[0]["keys"]]
        a, b = ours.relevance([row], keys), theirs.relevance([row], keys)
        # Read in other batches, a float32 may fall to the other side of a rounding: one unit of float16's last bit.
        unit = 2**-10 * np.abs(b - b.mean(1, keepdims=True)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=unit)


def reader(taught: Taught, *overrides: str, kind: str = "cross_encoder") -> None:
    """Open a cache as a run does."""
    config = settled(load_config(taught.config(kind), overrides))
    open_cache(Lesson.of(config), open_groups(config.data), ALONE)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teacher.max_length=32", "teacher.max_length: is 32"),
        ("teacher.scale=none", ""),  # stored as the model gives it: z-scores are taken when it is read
        ("teacher.scale=cosine", ""),  # which scores have none of
        ("teacher.passage_prompt=x", "teacher.passage_prompt: is 'x'"),
        ("teacher.dtype=bf16", "was made with 'fp32'"),
        ("data.negatives=7", ""),
        ("data.negatives=8", "lists 7 negatives, 8 are drawn"),
        ("seed=99", ""),
    ],
)
def test_another_configuration_is_refused(taught: Taught, override: str, told: str) -> None:
    if not told:
        reader(taught, override)
        return
    with pytest.raises(InputError) as caught:
        reader(taught, override)
    assert told in str(caught.value)
    assert "lead-ds teach" in str(caught.value)


def test_another_scale_of_vectors_is_refused(taught: Taught) -> None:
    with pytest.raises(InputError, match=r"teacher\.scale: is 'none', .* was made with 'cosine'"):
        reader(taught, "teacher.scale=none", kind="dual_encoder")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "train.jsonl"])
def test_other_data_are_refused(taught: Taught, tmp_path: Path, name: str) -> None:
    data = load_config(taught.config("cross_encoder")).data.path
    shutil.copytree(data, tmp_path / "data")
    reader(taught, f"data.path={tmp_path / 'data'}")
    path = tmp_path / "data" / name
    changed = path.read_text().replace("octopus", "squid") if name == "corpus.jsonl" else path.read_text() + "\n"
    path.write_text(changed)
    with pytest.raises(InputError, match=rf"made of other data: {name.split('.')[0]} .*{name}\) differs"):
        reader(taught, f"data.path={tmp_path / 'data'}")


def test_a_corrupt_shard_is_refused(taught: Taught, tmp_path: Path) -> None:
    shutil.copytree(taught.cache("cross_encoder"), tmp_path / "cache")
    override = f"teacher.path={tmp_path / 'cache'}"
    reader(taught, override)
    path = shard_path(tmp_path / "cache", 2)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"relevance-00002\.safetensors: is damaged: its content changed"):
        reader(taught, override)
    shutil.copy(shard_path(taught.cache("llm_reranker"), 2), path)
    with pytest.raises(InputError, match="belongs to another cache"):
        reader(taught, override)
    path.unlink()
    with pytest.raises(InputError, match="1 of 5 shards are missing"):
        reader(taught, override)
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"manifest\.json: is not that of a teacher's cache: it has no 'facts'"):
        reader(taught, override)


def test_a_refusal_ends_with_status_2_and_writes_nothing(taught: Taught, tmp_path: Path) -> None:
    path = taught.config("cross_encoder")
    done = lead_ds("distill", path, "teacher.max_length=32", f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: teacher.max_length: is 32")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_teacher_is_not_mixed(taught: Taught) -> None:
    path = taught.folder / "cross_encoder-teach.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["teacher"]["max_length"] = 32
    changed = write(taught.folder / "changed.yaml", tree)
    [[told]] = launch("tests.engine.jobs:teach_each", 1, configs=[changed])
    assert "holds the relevance of another teacher.settings.max_length" in told


def test_random_negatives_are_those_of_the_seed_and_epochs(rooms: Path, tmp_path: Path) -> None:
    # A qrels file lists no negatives: 30 groups, 4 a step, so that 16 steps begin three epochs.
    data = {"path": str(rooms / "data"), "train": "qrels/train.tsv", "negatives": 3}
    tree = settings(rooms, tmp_path / "teach", "cross_encoder", data=data, train={"steps": 16, "save_every": 16})
    [[layers]] = launch("tests.engine.jobs:teach_each", 1, configs=[write(tmp_path / "teach.yaml", tree)])
    assert layers == 4
    cached = {**tree, "teacher": {"kind": "cached", "path": str(tmp_path / "teach" / "cache")}}
    path = write(tmp_path / "cached.yaml", {**cached, "output": str(tmp_path / "cached")})
    [[losses]] = launch("tests.engine.jobs:distil_each", 1, configs=[path])
    assert len(losses) == 16
    for override, told in (("seed=4", "seed 4"), ("data.negatives=4", "negatives 4"), ("train.steps=22", "epochs 4")):
        config = settled(load_config(path, [override]))
        with pytest.raises(InputError, match=told):
            open_cache(Lesson.of(config), open_groups(config.data), ALONE)


def test_what_no_cache_can_give_is_refused_at_once(taught: Taught) -> None:
    for override, told in (
        ("losses.attention.weight=1", "no attention maps"),
        ("teacher.train=true", "cannot be trained"),
    ):
        with pytest.raises(InputError, match=told):
            load_config(taught.config("cross_encoder"), [override])


def test_plan_counts_no_teacher(taught: Taught) -> None:
    from lead_ds.plan.requirements import requirements

    assert not requirements(load_config(taught.config("cross_encoder"))).teachers
    assert requirements(load_config(taught.folder / "cross_encoder-online.yaml")).teachers
