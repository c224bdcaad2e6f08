"""`teach`: the frozen teacher's output for every passage that training may draw, into a cache: relevance, or
vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lead_ds.data.groups.group import Groups
from lead_ds.data.taught.relevance import VERSION, TeacherCache, identity, read_manifest
from lead_ds.data.taught.vectors import VectorCache
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.io.facts import ANOTHER_FOLDER, check_facts
from lead_ds.io.files import write_json
from lead_ds.io.owner import owned
from lead_ds.io.progress import progress
from lead_ds.io.provenance import provenance
from lead_ds.io.shards import MANIFEST, damage, refuse_strangers, unfinished
from lead_ds.models.as_read import reading_line, sample
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.settings.roles import TeacherRole
from lead_ds.settings.run import Run
from lead_ds.teachers.cached import epochs_of
from lead_ds.teachers.frozen import build_teacher, teacher_dtype, to_read
from lead_ds.teachers.identity import data_facts, teacher_facts
from lead_ds.teachers.informative import worth_of_cache
from lead_ds.teachers.lens import open_lens
from lead_ds.teachers.reading import ComparingReader, Reader, opened, say, write_in_turns
from lead_ds.teachers.shards import TEXTS_READ, RelevanceShards, Shards, Stored, VectorShards, layers_to_keep
from lead_ds.teachers.teacher import Lesson


def teach(
    config: Run,
    out: Path,
    *,
    vectors: str | None = None,
    stored: Stored = "float16",
    epochs: int | None = None,
    shard_size: int | None = None,
    command: Sequence[str] = (),
    quiet: bool = False,
) -> TeacherCache:
    """Write the teacher's output for every training group to `out`, or finish what an earlier call began.

    Relevance within the groups, from every layer; or with `vectors` (see `layers_to_keep`) vectors of all their texts, in
    `stored`. Every process calls this, on a file system they share. epochs: whose random negatives are included, where
    groups list too few. Default: those that train.steps take on as many processes as now. shard_size: groups, or texts, of a
    file.
    Raises InputError where the input cannot work or `out` holds another cache; RunError, with the finished shards
    intact, where the work fails.
    """
    asked = teachable(config, vectors is not None)
    with opened(config, asked, out) as (ranks, config, groups, encoder), owned(out, "another lead-ds teach", ranks):
        settings: TeacherRole = config.teacher
        shards = agreed(ranks, lambda: shards_of(config, out, groups, vectors, stored))
        facts = agreed(ranks, lambda: facts_of(config, groups, encoder, epochs, ranks) if ranks.main else {})
        manifest = ranks.from_main(agreed(ranks, lambda: begin(shards, facts) if ranks.main else {}))
        dtype = str(teacher_dtype(settings, ranks.device))
        if manifest["layers"] is None or (todo := unfinished_of(shards, manifest, ranks)):
            torch.manual_seed(config.seed)  # a teacher of random weights is the same on every rank
            teacher = build_teacher(Lesson.of(config), ranks)
            check_vocabulary(teacher.scorer, encoder, settings.path)
            if manifest["layers"] is None:
                manifest = complete(shards, manifest, shard_size, teacher, ranks, command)
                todo = unfinished_of(shards, manifest, ranks)
            if ranks.main and not quiet:
                held, whole = teacher.parameter_bytes()
                say(f"teacher {settings.path}: {teacher.num_layers} layers, {teacher.placement}, {dtype[6:]}")
                say(f"teacher {reading_line(teacher.scorer, encoder, *sample(groups))}")
                say(f"{held / 1e6:.1f} of {whole / 1e6:.1f} MB of parameters on each rank; {shards.describe(manifest)}")
            window = config.train.batch_size * config.train.accumulation * (1 + config.data.negatives)
            batch_size = settings.batch_size or window

            def read_by(some: Shards) -> Reader:
                return some.reader(teacher, encoder, batch_size)

            reader = read_by(shards)
            if isinstance(shards, RelevanceShards):
                reader = read_once(shards, manifest, facts, read_by, ranks, quiet) or reader
            write_shards(shards, reader, manifest, todo, ranks, quiet)
        ranks.barrier()
        cache = agreed(ranks, lambda: shards.cache.open(out, verify=False))
        if ranks.main:
            shutil.rmtree(out / TEXTS_READ, ignore_errors=True)
        if "measured" not in cache.manifest and not groups.alone:
            agreed(ranks, lambda: note_worth(config, cache, groups) if ranks.main else None)
        ranks.barrier()
        return agreed(ranks, lambda: shards.cache.open(out, verify=False))


def shards_of(config: Run, out: Path, groups: Groups, vectors: str | None, stored: Stored) -> Shards:
    """What is to be kept. Raises InputError for what texts alone do not have."""
    settings: TeacherRole = config.teacher
    if groups.alone and config.data.negatives:
        raise InputError("data.negatives", "is ignored: texts alone have no negatives", "set it to 0")
    if vectors is None:
        if groups.alone:
            what = "holds texts alone: relevance is of a query and its passages"
            raise InputError(groups.path, what, "keep vectors: --vectors final")
        return RelevanceShards(config, settings, out, groups)
    return VectorShards(config, settings, out, groups, layers_to_keep(config, vectors), stored)


def read_once(
    shards: RelevanceShards,
    manifest: dict[str, Any],
    facts: dict[str, Any],
    read_by: Callable[[Shards], Reader],
    ranks: Ranks,
    quiet: bool,
) -> Reader | None:
    """What compares vectors of all texts, each read once into a cache of its own; None where it pays to read shard by shard.

    facts: see `facts_of`. read_by: what reads a shard of some shards. Every process calls this.
    """
    if not manifest.get("texts_read_once"):
        return None
    teacher = read_by(shards).teacher
    texts = shards.texts(teacher.num_layers)
    facts_of_texts = ranks.from_main(agreed(ranks, lambda: begin(texts, facts) if ranks.main else {}))
    if facts_of_texts["layers"] is None:
        facts_of_texts = complete(texts, facts_of_texts, None, teacher, ranks)
    left = unfinished_of(texts, facts_of_texts, ranks)
    write_shards(texts, read_by(texts), facts_of_texts, left, ranks, quiet)
    ranks.barrier()
    return ComparingReader(agreed(ranks, lambda: VectorCache.open(texts.out, verify=False)), shards.scale)


def complete(
    shards: Shards, manifest: dict[str, Any], size: int | None, teacher: Any, ranks: Ranks, command: Sequence[str] = ()
) -> dict[str, Any]:
    """A new manifest with layers and sizes, written. Every process calls this."""
    manifest = {**manifest, "layers": teacher.num_layers, **provenance(command, ranks.world)}

    def sizes() -> dict[str, int]:
        if not ranks.main:
            return {}
        shards.out.mkdir(parents=True, exist_ok=True)
        found = shards.sizes(size, teacher, manifest, ranks.world)
        write_json(shards.out / MANIFEST, manifest | found)
        return found

    manifest |= ranks.from_main(agreed(ranks, sizes))
    ranks.barrier()
    return manifest


def unfinished_of(shards: Shards, manifest: dict[str, Any], ranks: Ranks) -> list[int]:
    """Shards that are still to be made; what lies beside them is made now."""
    agreed(ranks, lambda: shards.prepare(manifest) if ranks.main else None)
    owner, paths = identity(manifest), [shards.path(shard, manifest) for shard in range(shards.count(manifest))]
    return ranks.from_main(unfinished(paths, lambda path: damage(path, owner), say) if ranks.main else [])


def note_worth(config: Run, cache: TeacherCache, groups: Groups) -> None:
    """Write into the manifest what each layer was found to be worth."""
    write_json(
        cache.folder / MANIFEST, {**cache.manifest, "measured": worth_of_cache(cache, groups, Lesson.of(config))}
    )


def teachable(config: Run, vectors: bool = False) -> TeacherRole:
    """The teacher of a configuration. Raises InputError where it, or its `vectors`, cannot be cached."""
    teacher = to_read(config)
    kind = KINDS[teacher.kind]
    if vectors and not kind.gives_vectors:
        has = "reads a query with a passage" if kind.reads_pairs else "has a vector for every token, not one for a text"
        raise InputError("--vectors", f"a teacher of kind {teacher.kind} {has}", "leave it out: relevance is kept then")
    if vectors and kind.sparse:
        what = f"a teacher of kind {teacher.kind} has vectors as wide as its vocabulary, which fill a disk"
        raise InputError("--vectors", what, "leave it out: relevance is kept then")
    return teacher


def begin(shards: Shards, facts: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a cache that an earlier call began, if it is of the same; else a new one, with layers None.

    facts: see `facts_of`.
    """
    out, facts = shards.out, {**facts, **shards.facts()}
    if (out / MANIFEST).exists():
        manifest = read_manifest(out, "choose another folder")
        had = "vectors" if "vectors" in manifest["facts"] else "relevance"
        if had != shards.kept:
            raise InputError(out, f"holds a teacher's {had}, not {shards.kept}", ANOTHER_FOLDER)
        check_facts(out, f"holds the {had}", manifest["facts"], facts)
        return manifest
    refuse_strangers(out, "*-*.safetensors")
    return {"facts": facts, "layers": None, "teacher_path": shards.settings.path}


def facts_of(config: Run, groups: Groups, encoder: TextEncoder, epochs: int | None, ranks: Ranks) -> dict[str, Any]:
    """Everything that decides what a cache holds, and nothing else."""
    teacher = config.teacher
    assert teacher is not None
    fewest = min(groups.offered(row) for row in range(len(groups)))
    draws: dict[str, Any] | None = None
    if fewest < config.data.negatives:
        draws = {"seed": config.seed, "negatives": config.data.negatives}
        draws["epochs"] = epochs or epochs_of(config.train, groups, config.seed, ranks)
        say(
            f"a group lists {fewest} of {config.data.negatives} negatives: the random ones of {draws['epochs']} epochs are "
            "included; mined ones would do for any seed and length (lead-ds mine)"
        )
    lens = open_lens(teacher, config.lens_folder, config.seed, encoder)
    return {
        "version": VERSION,
        "teacher": {
            **teacher_facts(teacher, encoder, config.seed),
            "computed_in": str(teacher_dtype(teacher, ranks.device)).removeprefix("torch."),
        },
        "lens": None if lens is None else lens.facts,
        "stored_in": "float16",
        "data": data_facts(groups),
        "fewest_negatives": fewest,
        "draws": draws,
    }


def write_shards(
    shards: Shards, reader: Reader, manifest: dict[str, Any], todo: list[int], ranks: Ranks, quiet: bool
) -> None:
    """Write the shards of `todo`, every rank its own; they take turns together, for a sharded teacher needs them all."""
    total = sum(shards.amount(shard, manifest) for shard in todo[ranks.rank :: ranks.world])
    shown = ranks.main and not quiet and total > 0
    with progress("teaching", total, shards.unit, shown=shown) as meter:
        write_in_turns(todo, ranks, reader, partial(shards.load, manifest), partial(shards.save, manifest), meter)
