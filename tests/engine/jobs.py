"""What the engine's tests run on several processes. Each job calls the real thing and returns what it saw, as JSON."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lead_ds.config import Config, load_config
from lead_ds.data.groups.open import open_groups
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.training.distill import distill, settled
from lead_ds.engine.training.warmup import warmup
from lead_ds.errors import LeadError
from lead_ds.models.lens import load_lens
from lead_ds.relevance import Features, ScoreFeatures, TokenFeatures
from lead_ds.teachers.cached import CachedTeacher, open_cache
from lead_ds.teachers.fit_lens import Fit, fit_lens, save_lens
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teach import teach
from lead_ds.teachers.teacher import Lesson
from tests.helpers.batches import windows_of
from tests.helpers.sharded import resident_parameters


def losses_of(run: Path) -> list[float]:
    """The loss of every step of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def distil_each(configs: list[str], resume: bool = False) -> list[Any]:
    """Distil, or continue, every configuration in turn in one group of processes: the losses, or the error that ended it."""
    results: list[Any] = []
    with ranks():
        for path in configs:
            try:
                config = load_config(path)
                distill(config, resume=resume, quiet=True)
                results.append(losses_of(Path(config.output)))
            except LeadError as error:
                results.append(str(error))
    return results


def warm_each(cases: list[tuple[str, str]]) -> list[Any]:
    """Warm up the model of each (configuration, section) in turn: the losses, or the error that ended it."""
    results: list[Any] = []
    with ranks():
        for path, of in cases:
            try:
                config = load_config(path)
                warmup(config, of, quiet=True)
                results.append(losses_of(Path(config.output)))
            except LeadError as error:
                results.append(str(error))
    return results


def sharded_teachers(configs: list[str], forwards: int) -> list[dict[str, Any]]:
    """Of each configuration's teacher: its features sharded and replicated compared, and what it holds in memory."""
    found = []
    with ranks() as here:
        for path in configs:
            config = load_config(path)
            assert config.teacher is not None
            window = windows_of(config, here).window(0)
            answers = {}
            for placement in ("replicate", "zero3"):
                placed = config.model_copy(
                    update={"teacher": config.teacher.model_copy(update={"placement": placement})}
                )
                teacher = build_teacher(Lesson.of(placed), here)
                layers = list(range(teacher.scorer.num_layers))
                view = teacher.window(window.teachers[0], layers)
                answers[placement] = [*tensors(view.final), *tensors(view.layers)]
            held, whole = teacher.parameter_bytes()
            memory = []
            for _ in range(forwards):
                teacher.window(window.teachers[0], layers)
                memory.append(resident_bytes())
            resident, persistent = resident_parameters(teacher.scorer)
            found.append(
                {
                    "equal": [torch.equal(a, b) for a, b in zip(answers["replicate"], answers["zero3"], strict=True)],
                    "shapes": [list(a.shape) for a in answers["zero3"]],
                    "dtype": str(next(teacher.scorer.parameters()).dtype),
                    "held": held,
                    "whole": whole,
                    "resident": resident,
                    "persistent": persistent,
                    "memory": memory,
                }
            )
    return found


def tensors(features: Features | None) -> list[torch.Tensor]:
    """The tensors of features."""
    assert features is not None
    if isinstance(features, ScoreFeatures):
        return [features.s_KQN]
    if isinstance(features, TokenFeatures):
        return [features.q_KQLD, features.p_KPLD]
    return [features.q_KQD, features.p_KPD]


def resident_bytes() -> int:
    """This process's resident set."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def teach_each(configs: list[str], **options: Any) -> list[Any]:
    """Teach every configuration in turn, into its output's `cache`: the number of layers, or the error that ended it."""
    results: list[Any] = []
    with ranks():
        for path in configs:
            config = load_config(path)
            try:
                results.append(teach(config, Path(config.output) / "cache", quiet=True, **options).num_layers)
            except LeadError as error:
                results.append(str(error))
    return results


def cached_and_online(pairs: list[list[str]]) -> list[dict[str, float]]:
    """Of each (teacher's, cached) pair of configurations, over the first epoch: how far cached relevance is from the
    teacher's own, as a multiple of what float16 may round away, and the largest deviation that is stored."""
    found = []
    with ranks() as here:
        for own, cached in pairs:
            config, reader = load_config(own), settled(load_config(cached))
            assert reader.teacher is not None
            groups = open_groups(config.data)
            online = build_teacher(Lesson.of(config), here)
            cache = open_cache(Lesson.of(reader), groups, here)
            teacher = CachedTeacher(cache, reader.teacher, here.device)
            alone = replace(here, rank=0, world=1)
            theirs, ours = windows_of(config, alone, groups), windows_of(reader, alone, groups)
            layers = list(range(teacher.num_layers))
            # Half a unit in the last of float16's 11 bits of the largest deviation that is stored; float32's own noise.
            largest = max(
                float(np.abs(cache._open(path, lambda arrays: {})["deviation"]).max()) for path in cache.paths
            )
            ratio = 0.0
            for step in range(theirs.steps_per_epoch):
                views = (
                    online.window(theirs.window(step).teachers[0], layers),
                    teacher.window(ours.window(step).teachers[0], layers),
                )
                for name in ("final", "layers"):
                    a, b = (unscaled(getattr(view, name)).group_relevance(theirs.group_size).logits for view in views)
                    allowed = 2**-12 * 2 ** np.ceil(np.log2(largest)) + 1e-5 * b.abs().max().item()
                    ratio = max(ratio, (a - b).abs().max().item() / allowed)
            found.append({"ratio": ratio, "deviation": largest})
    return found


def unscaled(features: Features) -> Features:
    """Scores as they are stored: a z-score is taken when they are read, and would magnify what float16 rounds away."""
    return replace(features, scale="none") if isinstance(features, ScoreFeatures) else features


def lenses(configs: list[str], sharded: bool) -> list[dict[str, Any]]:
    """Of each configuration its fitted lens's layers. Then a random lens is put in its place, by whose record two layers
    are informative; `sharded`: what the teacher says through it, replicated and sharded, and through its own head."""
    found = []
    with ranks() as here:
        for path in configs:
            config = load_config(path)
            record = fit_lens(config, config.lens_folder, Fit(steps=40, held_out=0.2), quiet=True)
            if here.main:
                scramble(config.lens_folder, record)
            here.barrier()
            fact: dict[str, Any] = {"layers": record["layers"]}
            if sharded:
                tuned, shards, head = (
                    first_window(config, here, lens=lens, placement=placement)
                    for lens, placement in (("tuned", "replicate"), ("tuned", "zero3"), ("head", "replicate"))
                )
                fact["sharded"] = [torch.equal(a, b) for a, b in zip(tuned, shards, strict=True)]
                final = len(tuned) // 2
                fact["final"] = [torch.equal(a, b) for a, b in zip(tuned[:final], head[:final], strict=True)]
                moved = zip(tuned[final:], head[final:], strict=True)
                fact["moved"] = [float((a.float() - b.float()).abs().max()) for a, b in moved]
            found.append(fact)
    return found


def scramble(folder: Path, record: dict[str, Any]) -> None:
    """Put random numbers into a lens, and say that its layers 0 and 2 know something."""
    lens, generator = load_lens(folder, "")[0], torch.Generator().manual_seed(5)
    for tensor in lens.tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator))
    for row in record["layers"]:
        row["after"] = {"nll": record["chance"]["nll"] - (0.5 if row["layer"] in (0, 2) else 0.05), "accuracy": 0.5}
    save_lens(folder, lens, {**record, "checksum": lens.checksum(record["facts"])})


def first_window(config: Config, here: Ranks, **settings: Any) -> list[torch.Tensor]:
    """What a teacher so changed says of its first window: the final state's tensors, then as many of its layers."""
    assert config.teacher is not None
    placed = config.model_copy(update={"teacher": config.teacher.model_copy(update=settings)})
    window = windows_of(config, here).window(0)
    teacher = build_teacher(Lesson.of(placed), here)
    view = teacher.window(window.teachers[0], list(range(teacher.num_layers)))
    return [*tensors(view.final), *tensors(view.layers)]


def through_lenses(configs: list[str], cached: list[str], runs: list[str], resumed: str) -> dict[str, Any]:
    """Lenses of `configs` on one process; their caches against what the teacher says online; the losses of `runs`, and of
    the run `resumed` as it was, without its last checkpoint continued, and refused through another lens."""
    with ranks():
        layers = [fact["layers"] for fact in lenses(configs, sharded=False)]
        taught = teach_each(configs)
        distances = cached_and_online([[own, other] for own, other in zip(configs, cached, strict=True)])
        found = {"layers": layers, "taught": taught, "distances": distances, "losses": distil_each(runs)}
        found["resumed"] = [*distil_each([resumed]), *(continued(resumed, other) for other in (False, True))]
        return found


def continued(path: str, other_lens: bool) -> Any:
    """The losses of a run of `path` that lost its last checkpoint and goes on; or, through another lens, the error."""
    config = load_config(path)
    whole, output = Path(config.output), Path(f"{config.output}-continued")
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(whole, output)
    shutil.rmtree(max((output / "checkpoints").glob("step-*")))
    overrides = [f"output={output}"]
    if other_lens:
        shutil.copytree(config.lens_folder, output / "other")
        scramble(output / "other", load_lens(output / "other", "")[1])
        overrides.append(f"teacher.lens_path={output / 'other'}")
    try:
        distill(load_config(path, overrides), resume=True, quiet=True)
    except LeadError as error:
        return str(error)
    return losses_of(output)
