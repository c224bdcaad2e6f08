"""A teacher that is read from what `teach` wrote: no weights, no tokenizer, no memory but what it says of the batch.

Dimensions: A micro-batches of B queries, N passages of each, T layers of the teacher, K selected ones, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lead_ds.config import Config, TeacherConfig
from lead_ds.data.batches import ModelBatch
from lead_ds.data.groups.group import Groups
from lead_ds.data.taught.relevance import RelevanceCache, TeacherCache, read_manifest
from lead_ds.data.taught.vectors import VectorCache
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.models.lens import load_lens
from lead_ds.relevance import Features, Scale, ScoreFeatures, VectorFeatures
from lead_ds.teachers.frozen import TeacherView
from lead_ds.teachers.identity import data_facts, stored_scale

_ANEW = "run lead-ds teach with this configuration, in a new folder"


class CachedTeacher:
    """Answers windows as `FrozenTeacher` does: with scores of each query's own passages, or with vectors."""

    placement = "cached"

    def __init__(self, cache: TeacherCache, settings: TeacherConfig, device: torch.device) -> None:
        self.cache, self.settings, self.device = cache, settings, device
        self.layers = cache.layers
        # Cosines of relevance were taken when the cache was made; z-scores depend on the passages drawn and are taken now.
        taken = isinstance(cache, RelevanceCache) and settings.scale == "cosine"
        self.scale: Scale = "none" if taken else settings.scale
        self.lens_facts: dict[str, Any] | None = cache.manifest["facts"].get("lens")

    @property
    def num_layers(self) -> int:
        """T."""
        return self.cache.num_layers

    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        """Relevance of a window's groups: final [1, A * B, N], layers [K, A * B, N]; or vectors [1 or K, texts, D]. float32."""
        assert not tap_layers
        parts = [chunk.to(self.device).cached for chunk in chunks]
        said = {name: [part[name] for part in parts if part is not None] for name in parts[0] or {}}
        places = [self.layers.index(layer) for layer in layers]
        return TeacherView(
            final=self._features(said, [len(self.layers)]),
            layers=self._features(said, places) if places else None,
            outputs=[],
        )

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
        """What run.json says of the teacher."""
        teacher = self.cache.manifest["facts"]["teacher"]
        return {
            "placement": self.placement,
            "cache": str(self.cache.folder),
            "kind": teacher["kind"],
            "path": self.cache.manifest["teacher_path"],
            "checksum": teacher["checksum"],
            "layers": self.num_layers,
            "vectors_of_layers": self.layers if isinstance(self.cache, VectorCache) else None,
            "lens": self.lens_facts,
            "dtype": teacher["computed_in"],
            "parameter_bytes": 0,
            "parameter_bytes_per_rank": 0,
        }

    def describe(self) -> str:
        """A line for the start of a run."""
        facts = self.facts()
        compared = "every passage of the batch" if isinstance(self.cache, VectorCache) else "its own passages"
        return (
            f"teacher {facts['path']}: {self.cache.held()}, read from {facts['cache']}; every teacher loss compares a query "
            f"with {compared}"
        )


def reads_cache(config: Config) -> bool:
    """Whether a run learns from a cached teacher."""
    return config.teacher is not None and config.teacher.kind == "cached" and config.losses.needs_teacher


def with_cached_settings(config: Config) -> Config:
    """The configuration with what its cached teacher was made with filled in.

    Raises InputError for a setting of the teacher that is given and was another one.
    """
    teacher = config.teacher
    if teacher is None or not reads_cache(config):
        return config
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
    return config.model_copy(update={"teacher": teacher.model_copy(update=known)})


def open_cache(config: Config, groups: Groups, ranks: Ranks) -> TeacherCache:
    """The cache of a configuration's teacher, checked against the groups that the run will draw.

    Raises InputError, naming what differs.
    """
    assert config.teacher is not None
    first = ranks.local_rank == 0  # one process of each machine reads everything
    holds_vectors = "vectors" in read_manifest(Path(config.teacher.path))["facts"]
    kind: type[TeacherCache] = VectorCache if holds_vectors else RelevanceCache
    cache = kind.open(config.teacher.path, verify=first)
    facts = cache.manifest["facts"]
    now = data_facts(groups) if first else {"groups": len(groups)}
    for name, value in now.items():
        if facts["data"].get(name) != value:
            source = groups.sources.get(name, groups.path)
            raise InputError(cache.folder, f"was made of other data: {name} ({source}) differs", _ANEW)
    if config.data.negatives <= facts["fewest_negatives"]:
        return cache
    draws = facts["draws"]
    needed = {"seed": config.seed, "negatives": config.data.negatives, "epochs": epochs_of(config, len(groups), ranks)}
    for name, value in needed.items():
        had = None if draws is None else draws[name]
        enough = had is not None and (had == value if name == "seed" else had >= value)
        if not enough:
            what = (
                f"a group lists {facts['fewest_negatives']} negatives, {config.data.negatives} are drawn, at random: with "
                f"{name} {value}, the cache holds those of {name} {had}"
            )
            raise InputError(cache.folder, what, f"mine first (lead-ds mine), or {_ANEW}")
    return cache


def epochs_of(config: Config, groups: int, ranks: Ranks) -> int:
    """Epochs that a run of the configuration begins."""
    step = ranks.world * config.train.batch_size * config.train.accumulation
    return -(-config.train.steps // max(1, groups // step))
