"""`teach`: the frozen teacher's relevance of every passage that training may draw, of every layer, into a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lead_ds.config import Config, TeacherConfig
from lead_ds.data.groups import Groups
from lead_ds.data.teacher_cache import (
    MANIFEST,
    VERSION,
    TeacherCache,
    identity,
    read_manifest,
    save_arrays,
    shard_arrays,
    shard_path,
)
from lead_ds.data.tokens import TextEncoder
from lead_ds.engine.agreement import agreed
from lead_ds.engine.cached import epochs_of
from lead_ds.engine.identity import check_facts, data_facts, stored_scale, teacher_facts
from lead_ds.engine.informative import worth_of_cache
from lead_ds.engine.lens import lens_facts
from lead_ds.engine.provenance import provenance
from lead_ds.engine.ranks import Ranks
from lead_ds.engine.reading import PAIRS, RelevanceReader, Shard, opened, say, unfinished, write_in_turns
from lead_ds.engine.teacher import build_teacher, teacher_dtype
from lead_ds.errors import InputError, RunError
from lead_ds.retrieval.files import atomic, write_json
from lead_ds.retrieval.progress import progress

GROUPS_OF_PAIRS, GROUPS_OF_TEXTS = 512, 2048  # of a shard; texts that its groups share are read once


def teach(
    config: Config,
    out: Path,
    *,
    epochs: int | None = None,
    shard_groups: int | None = None,
    command: Sequence[str] = (),
    quiet: bool = False,
) -> TeacherCache:
    """Write the teacher's relevance of every training group to `out`, or finish what an earlier call began.

    Every process calls this, on a file system they share. epochs: whose random negatives are included, where groups
    list too few (default: those that train.steps take on as many processes as now).
    Raises InputError where the input cannot work or `out` holds another cache; RunError, with the finished shards
    intact, where the work fails.
    """
    settings = teachable(config)
    with opened(config, settings, out) as (ranks, groups, encoder):
        manifest = ranks.from_main(
            agreed(ranks, lambda: begin(config, out, groups, encoder, epochs, ranks) if ranks.main else {})
        )
        dtype = str(teacher_dtype(settings, ranks.device))
        if manifest["layers"] is None or (todo := unfinished(shard_paths(out, manifest), identity(manifest), ranks)):
            torch.manual_seed(config.seed)  # a teacher of random weights is the same on every rank
            teacher = build_teacher(config, ranks)
            if manifest["layers"] is None:
                size = shard_groups or groups_of_shard(settings, len(groups), ranks)
                manifest |= {"layers": teacher.num_layers, "shard_groups": size, **provenance(command, ranks.world)}
                if ranks.main:
                    write_json(out / MANIFEST, manifest)
                ranks.barrier()
                todo = unfinished(shard_paths(out, manifest), identity(manifest), ranks)
            if ranks.main and not quiet:
                held, whole = teacher.parameter_bytes()
                say(f"teacher {settings.path}: {teacher.num_layers} layers, {teacher.placement}, {dtype[6:]}")
                say(f"{held / 1e6:.1f} of {whole / 1e6:.1f} MB of parameters on each rank; {len(groups)} groups")
            window = config.train.batch_size * config.train.accumulation * (1 + config.data.negatives)
            reader = RelevanceReader(settings, teacher, encoder, settings.batch_size or window)
            write_shards(config, out, groups, reader, manifest, todo, ranks, quiet)
        ranks.barrier()
        cache = agreed(ranks, lambda: TeacherCache.open(out, verify=False))
        if "measured" not in cache.manifest:
            agreed(ranks, lambda: note_worth(config, cache, groups) if ranks.main else None)
        ranks.barrier()
        return agreed(ranks, lambda: TeacherCache.open(out, verify=False))


def note_worth(config: Config, cache: TeacherCache, groups: Groups) -> None:
    """Write into the manifest what each layer was found to be worth."""
    write_json(cache.folder / MANIFEST, {**cache.manifest, "measured": worth_of_cache(cache, groups, config)})


def teachable(config: Config) -> TeacherConfig:
    """The teacher of a configuration. Raises InputError where it cannot be cached."""
    teacher = config.teacher
    if teacher is None:
        raise InputError("teacher", "is missing", "name the model to learn from")
    if teacher.kind == "cached":
        raise InputError("teacher.kind", "is cached already", "name the teacher itself, with its kind")
    if teacher.train:
        raise InputError("teacher.train", "a co-trained teacher changes at every step", "set teacher.train=false")
    return teacher


def begin(
    config: Config, out: Path, groups: Groups, encoder: TextEncoder, epochs: int | None, ranks: Ranks
) -> dict[str, Any]:
    """The manifest of a cache that an earlier call began, if it is of the same; else a new one, with layers None."""
    facts = facts_of(config, groups, encoder, epochs, ranks)
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        check_facts(out, "holds the relevance", manifest["facts"], facts)
        return manifest
    if out.exists() and not out.is_dir():
        raise InputError(out, "is a file", "choose a folder with --out")
    if any(out.glob("relevance-*.safetensors")):
        raise InputError(out, "holds shards without a manifest", "delete it, or choose another folder with --out")
    assert config.teacher is not None
    return {"facts": facts, "layers": None, "shard_groups": None, "teacher_path": config.teacher.path}


def facts_of(config: Config, groups: Groups, encoder: TextEncoder, epochs: int | None, ranks: Ranks) -> dict[str, Any]:
    """Everything that decides what a cache holds, and nothing else."""
    teacher = config.teacher
    assert teacher is not None
    fewest = min(groups.offered(row) for row in range(len(groups)))
    draws = None
    if fewest < config.data.negatives:
        draws = {"seed": config.seed, "negatives": config.data.negatives}
        draws["epochs"] = epochs or epochs_of(config, len(groups), ranks)
        say(
            f"a group lists {fewest} of {config.data.negatives} negatives: the random ones of {draws['epochs']} epochs are "
            "included; mined ones would do for any seed and length (lead-ds mine)"
        )
    return {
        "version": VERSION,
        "teacher": {
            **teacher_facts(teacher, encoder, config.seed),
            "computed_in": str(teacher_dtype(teacher, ranks.device)).removeprefix("torch."),
        },
        "lens": lens_facts(config, encoder),
        "scale": stored_scale(teacher.kind, teacher.scale),
        "stored_in": "float16",
        "data": data_facts(groups),
        "fewest_negatives": fewest,
        "draws": draws,
    }


def groups_of_shard(settings: TeacherConfig, groups: int, ranks: Ranks) -> int:
    """Groups of a shard: few enough that every rank has work until the end, and that a kill costs little."""
    most = GROUPS_OF_PAIRS if settings.kind in PAIRS else GROUPS_OF_TEXTS
    return max(1, min(most, -(-groups // (4 * ranks.world))))


def shard_paths(out: Path, manifest: dict[str, Any]) -> list[Path]:
    """The files of a cache."""
    groups, size = manifest["facts"]["data"]["groups"], manifest["shard_groups"]
    return [shard_path(out, shard) for shard in range(-(-groups // size))]


def write_shards(
    config: Config,
    out: Path,
    groups: Groups,
    reader: RelevanceReader,
    manifest: dict[str, Any],
    todo: list[int],
    ranks: Ranks,
    quiet: bool,
) -> None:
    """Write the shards of `todo`, every rank its own; they take turns together, for a sharded teacher needs them all."""
    size, draws = manifest["shard_groups"], manifest["facts"]["draws"]

    def load(shard: int | None) -> Shard:
        rows = range(0) if shard is None else range(shard * size, min((shard + 1) * size, len(groups)))
        return Shard.read(groups, rows, config.data.negatives, draws)

    total = sum(min(size, len(groups) - shard * size) for shard in todo[ranks.rank :: ranks.world])
    shown = ranks.main and not quiet and total > 0
    with progress("teaching", total, "groups", shown=shown) as meter:
        write_in_turns(todo, ranks, reader, load, partial(save_shard, out, manifest), meter)


def save_shard(out: Path, manifest: dict[str, Any], shard: int, texts: Shard, relevance: np.ndarray) -> None:
    """Write a shard, whole or not at all. Raises RunError for relevance that cannot be stored."""
    try:
        arrays = shard_arrays(texts.keys, relevance)
    except ValueError as error:
        raise RunError(shard_path(out, shard), f"the teacher gave {error}", "try teacher.scale=cosine") from None
    with atomic(shard_path(out, shard)) as temporary:
        save_arrays(temporary, arrays, identity(manifest))
