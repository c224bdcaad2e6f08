"""A teacher that is read from what `teach` wrote: no weights, no tokenizer, no memory but its output for the batch.

Dimensions: A micro-batches of B queries, N passages of each, T layers of the teacher, K selected ones, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.groups.group import Groups
from lead_ds.data.groups.mixture import MixedGroups
from lead_ds.data.reads import ModelBatch, Reads
from lead_ds.data.taught.relevance import RelevanceCache, TeacherCache, read_manifest
from lead_ds.data.taught.vectors import VectorCache
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.io.shards import MANIFEST
from lead_ds.models.lens import load_lens
from lead_ds.relevance import Features, Scale, ScoreFeatures, VectorFeatures
from lead_ds.settings.roles import CachedRole
from lead_ds.settings.train import TrainConfig
from lead_ds.teachers.identity import data_facts, stored_scale
from lead_ds.teachers.teacher import TEACHERS, Gift, Lesson, Teacher, TeacherView

_ANEW = "run lead-ds teach with this configuration, in a new folder"


@TEACHERS.register("cached")
class CachedTeacher(Teacher):
    """What `teach` kept of a frozen model: scores of each query's own passages, or vectors."""

    Settings = CachedRole
    gives = frozenset({"final", "layers", "features"})
    placement, reads_alone = "cached", True

    def __init__(self, cache: TeacherCache, settings: CachedRole, device: torch.device) -> None:
        self.cache, self.settings, self.device = cache, settings, device
        self.num_layers = cache.num_layers
        # Cosines of relevance were taken when the cache was made; z-scores depend on the passages drawn and are taken now.
        taken = cache.within_groups and settings.scale == "cosine"
        self.scale: Scale = "none" if taken else settings.scale
        self.lens_facts = cache.manifest["facts"].get("lens")

    @classmethod
    def settled(cls, settings: CachedRole) -> CachedRole:
        """See `Teacher`: with what the cache was made with."""
        return with_cached_settings(settings)

    @classmethod
    def given(cls, settings: CachedRole) -> frozenset[Gift]:
        """See `Teacher`: vectors, or scores; all of it where there is no cache to look into yet."""
        folder = Path(settings.path)
        scores = (folder / MANIFEST).is_file() and "vectors" not in read_manifest(folder)["facts"]
        return cls.gives - {"features"} if scores else cls.gives

    @classmethod
    def files(cls, settings: CachedRole) -> dict[str, Path]:
        """See `Teacher`: the manifest, which holds the checksums of what is beside it."""
        return {MANIFEST: Path(settings.path) / MANIFEST}

    @classmethod
    def reads(cls, lesson: Lesson, groups: Groups, ranks: Ranks) -> Reads:
        """See `Teacher`: what the cache holds of them."""
        return Reads(lookup=open_cache(lesson, groups, ranks))

    @classmethod
    def open(cls, lesson: Lesson, reads: Reads, sample: Callable[[], list[ModelBatch]], ranks: Ranks) -> CachedTeacher:
        assert isinstance(reads.lookup, TeacherCache)
        return cls(reads.lookup, lesson.teacher, ranks.device)

    @property
    def readable(self) -> list[int]:
        """See `Teacher`: the layers that are kept."""
        return self.cache.layers

    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        """Relevance of a window's groups: final [1, A * B, N], layers [K, A * B, N]; or vectors [1 or K, texts, D]. float32."""
        assert not tap_layers
        parts = [chunk.to(self.device).looked_up for chunk in chunks]
        said = {name: [part[name] for part in parts if part is not None] for name in parts[0] or {}}
        places = [self.readable.index(layer) for layer in layers]
        final = self._features(said, [len(self.readable)])
        return TeacherView(final, self._features(said, places) if places else None)

    def _features(self, said: dict[str, list[Tensor]], places: Sequence[int]) -> Features:
        """Features of what stands at `places` of a cache's layers and final state."""
        if "relevance" in said:
            relevance_QNT = torch.cat(said["relevance"])
            return ScoreFeatures(torch.stack([relevance_QNT[..., place] for place in places]), self.scale)
        queries, passages = torch.cat(said["queries"], 1), torch.cat(said["passages"], 1)
        # Not by a list of indices, which a GPU would have to wait for.
        q_KQD, p_KPD = (torch.stack([x[place] for place in places]) for x in (queries, passages))
        return VectorFeatures(q_KQD, p_KPD, self.scale)

    def facts(self) -> dict[str, Any]:
        teacher = self.cache.manifest["facts"]["teacher"]
        return {
            "placement": self.placement,
            "cache": str(self.cache.folder),
            "kind": teacher["kind"],
            "path": self.cache.manifest["teacher_path"],
            "checksum": teacher["checksum"],
            "layers": self.num_layers,
            "vectors_of_layers": None if self.cache.within_groups else self.readable,
            "lens": self.lens_facts,
            "dtype": teacher["computed_in"],
            "parameter_bytes": 0,
            "parameter_bytes_per_rank": 0,
        }

    def describe(self) -> str:
        facts = self.facts()
        compared = "its own passages" if self.cache.within_groups else "every passage of the batch"
        return (
            f"teacher {facts['path']}: {self.cache.held()}, read from {facts['cache']}; every teacher loss compares a query "
            f"with {compared}"
        )


def with_cached_settings(teacher: CachedRole) -> CachedRole:
    """The settings of a cached teacher with what it was made with filled in.

    Raises InputError for one that is given and was another.
    """
    facts = read_manifest(Path(teacher.path))["facts"]
    made, kind = {"lens": "head"} | facts["teacher"]["settings"], facts["teacher"]["kind"]
    for name in sorted(teacher.model_fields_set & made.keys()):
        value = getattr(teacher, name)
        same = value == made[name]
        if name == "scale":  # vectors are stored as they are
            same = "vectors" in facts or stored_scale(kind, value) == stored_scale(kind, made[name])
        if not same:
            what = f"is {value!r}, {teacher.path} was made with {made[name]!r}"
            raise InputError(f"teacher.{name}", what, f"take the key out, or {_ANEW}")
    if teacher.lens_path is not None:
        _, record = load_lens(Path(teacher.lens_path), "take teacher.lens_path out")
        if record["checksum"] != (facts.get("lens") or {}).get("checksum"):
            raise InputError(teacher.path, f"was not made through the lens in {teacher.lens_path}", _ANEW)
    known = {name: value for name, value in made.items() if name not in teacher.model_fields_set}
    return teacher.model_copy(update=known)


def open_cache(lesson: Lesson, groups: Groups, ranks: Ranks) -> TeacherCache:
    """The cache of a lesson's teacher, checked against the groups that the run will draw.

    Raises InputError, naming what differs.
    """
    first = ranks.local_rank == 0  # one process of each machine reads everything
    path, negatives = lesson.teacher.path, lesson.data.negatives
    holds_vectors = "vectors" in read_manifest(Path(path))["facts"]
    kind: type[TeacherCache] = VectorCache if holds_vectors else RelevanceCache
    cache = kind.open(path, verify=first)
    facts = cache.manifest["facts"]
    now = data_facts(groups) if first else {"groups": len(groups)}
    for name, value in now.items():
        if facts["data"].get(name) != value:
            source = groups.sources.get(name, groups.path)
            raise InputError(cache.folder, f"was made of other data: {name} ({source}) differs", _ANEW)
    if negatives <= facts["fewest_negatives"]:
        return cache
    draws, epochs = facts["draws"], epochs_of(lesson.train, groups, lesson.seed, ranks)
    needed = {"seed": lesson.seed, "negatives": negatives, "epochs": epochs}
    for name, value in needed.items():
        had = None if draws is None else draws[name]
        if had is None or (had != value if name == "seed" else not np.all(np.array(had) >= value)):
            what = (
                f"a group lists {facts['fewest_negatives']} negatives, {negatives} are drawn, at random: with "
                f"{name} {value}, the cache holds those of {name} {had}"
            )
            raise InputError(cache.folder, what, f"mine first (lead-ds mine), or {_ANEW}")
    return cache


def epochs_of(train: TrainConfig, groups: Groups, seed: int, ranks: Ranks) -> int | list[int]:
    """Epochs that a run begins; of a mixture, of each set."""
    together = ranks.world * train.batch_size
    step = together * train.accumulation
    if isinstance(groups, MixedGroups):
        return groups.epochs(train.steps * step, seed, together)
    return -(-train.steps // max(1, len(groups) // step))
