"""What `teach` keeps of a teacher: relevance of each group's candidates, or vectors of all texts, shard by shard.

Dimensions: T layers of the teacher, K chosen ones, D width.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lead_ds.data.groups.group import Groups
from lead_ds.data.taught import relevance as relevance_files
from lead_ds.data.taught import vectors as vector_files
from lead_ds.data.taught.relevance import RelevanceCache, TeacherCache, identity
from lead_ds.data.taught.vectors import Listing, VectorCache, index_path, shard_of, vector_arrays
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError, RunError
from lead_ds.io.files import atomic
from lead_ds.io.shards import Arrays, damage, mapped, save_arrays
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.load import read_model_config
from lead_ds.relevance import Scale
from lead_ds.settings.roles import TeacherRole
from lead_ds.settings.run import Run
from lead_ds.teachers.frozen import FrozenTeacher
from lead_ds.teachers.identity import stored_scale
from lead_ds.teachers.reading import GroupTexts, Reader, RelevanceReader, VectorReader, drawn_besides, say

GROUPS_OF_PAIRS, GROUPS_OF_TEXTS = 512, 2048  # of a shard; texts that its groups share are read once
TEXTS = 4096  # of a shard of vectors
Stored = Literal["float16", "float32"]
TEXTS_READ = "texts_read"  # a folder that is gone once relevance is written
_REPEATED = 1.02  # passages read for a passage, at which it pays to keep their vectors until all are compared
_OF_DISK = 0.5  # what these may take of the free space


class Shards(ABC):
    """What a cache keeps, and how it is read from a teacher and written. `manifest` is complete once `sizes` are in it."""

    unit: str  # what progress counts
    kept: str  # in messages
    cache: type[TeacherCache]
    remedy: str  # where what the teacher gives cannot be stored

    def __init__(self, config: Run, settings: TeacherRole, out: Path, groups: Groups) -> None:
        self.config, self.settings, self.out, self.groups = config, settings, out, groups

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides the content, other than the teacher and the data."""

    @abstractmethod
    def sizes(self, asked: int | None, teacher: FrozenTeacher, manifest: dict[str, Any], world: int) -> dict[str, int]:
        """The sizes in the manifest; `asked`: groups or texts of a shard, if the user gives it."""

    def prepare(self, manifest: dict[str, Any]) -> None:  # noqa: B027 - most have nothing to prepare
        """Write what lies beside the shards, if it is not there. One process calls this."""

    @abstractmethod
    def describe(self, manifest: dict[str, Any]) -> str:
        """How much there is to keep, for the user."""

    @abstractmethod
    def count(self, manifest: dict[str, Any]) -> int:
        """How many shards there are."""

    @abstractmethod
    def path(self, shard: int, manifest: dict[str, Any]) -> Path:
        """The file of a shard."""

    @abstractmethod
    def reader(self, teacher: FrozenTeacher, encoder: TextEncoder, batch_size: int) -> Reader:
        """What reads a shard."""

    @abstractmethod
    def amount(self, shard: int, manifest: dict[str, Any]) -> int:
        """How many of `unit` a shard holds."""

    @abstractmethod
    def load(self, manifest: dict[str, Any], shard: int | None) -> GroupTexts:
        """The texts of a shard; of None, none."""

    @abstractmethod
    def arrays(self, texts: GroupTexts, said: np.ndarray) -> Arrays:
        """The arrays of a shard. Raises ValueError for what cannot be stored."""

    def save(self, manifest: dict[str, Any], shard: int, texts: GroupTexts, said: np.ndarray) -> None:
        """Write a shard, whole or not at all. Raises RunError for what cannot be stored."""
        path = self.path(shard, manifest)
        try:
            arrays = self.arrays(texts, said)
        except ValueError as error:
            raise RunError(path, f"the teacher gave {error}", self.remedy) from None
        with atomic(path) as temporary:
            save_arrays(temporary, arrays, identity(manifest))


class RelevanceShards(Shards):
    """Relevance of each group's own candidates, from every layer."""

    unit, kept, cache, remedy = (
        "groups",
        "relevance",
        RelevanceCache,
        "try teacher.scale=cosine; where it is not finite, teacher.dtype=bf16",
    )

    def facts(self) -> dict[str, Any]:
        return {"scale": self.scale}

    @property
    def scale(self) -> Scale:
        """In which scale relevance is stored."""
        return stored_scale(self.settings.kind, self.settings.scale)

    def texts(self, layers: int) -> VectorShards:
        """Where the vectors of all texts are kept meanwhile, from every layer, whole."""
        out = self.out / TEXTS_READ
        return VectorShards(self.config, self.settings, out, self.groups, range(layers), "float32")

    def _worth_reading_once(self, manifest: dict[str, Any], teacher: FrozenTeacher) -> bool:
        """Whether shards would read many passages again, and their vectors can be kept until all are compared."""
        kind = KINDS[self.settings.kind]
        if not kind.gives_vectors or kind.sparse or len(self.groups) <= manifest["shard_groups"]:
            return False
        listing = self.texts(0).listing(manifest["facts"]["draws"])
        again, texts = listing.read_by(manifest["shard_groups"]), len(np.unique(listing.keys))
        if again < _REPEATED * texts:
            return False
        size = (texts + len(np.unique(listing.asked))) * (manifest["layers"] + 1) * teacher.scorer.features_width * 4
        free = shutil.disk_usage(self.out).free
        if size > _OF_DISK * free:
            what = f"vectors of {size / 1e9:.1f} GB, of {free / 1e9:.1f} GB that are free"
            say(f"{texts} passages are read {again / texts:.1f} times each: to read each once would take {what}")
            return False
        return True

    def sizes(self, asked: int | None, teacher: FrozenTeacher, manifest: dict[str, Any], world: int) -> dict[str, int]:
        """Groups of a shard: few enough that every rank has work until the end, and that a kill costs little."""
        most = GROUPS_OF_PAIRS if KINDS[self.settings.kind].reads_pairs else GROUPS_OF_TEXTS
        groups = asked or max(1, min(most, -(-len(self.groups) // (4 * world))))
        # Kept, so that a later call, which may find another disk, goes on in the same way.
        once = self._worth_reading_once({**manifest, "shard_groups": groups}, teacher)
        return {"shard_groups": groups, "texts_read_once": int(once)}

    def describe(self, manifest: dict[str, Any]) -> str:
        return f"{len(self.groups)} groups"

    def count(self, manifest: dict[str, Any]) -> int:
        return -(-len(self.groups) // int(manifest["shard_groups"]))

    def path(self, shard: int, manifest: dict[str, Any]) -> Path:
        return relevance_files.shard_path(self.out, shard)

    def reader(self, teacher: FrozenTeacher, encoder: TextEncoder, batch_size: int) -> Reader:
        return RelevanceReader(self.settings, teacher, encoder, batch_size)

    def amount(self, shard: int, manifest: dict[str, Any]) -> int:
        return len(self._rows(shard, manifest))

    def load(self, manifest: dict[str, Any], shard: int | None) -> GroupTexts:
        rows = range(0) if shard is None else self._rows(shard, manifest)
        return GroupTexts.read(self.groups, rows, self.config.data.negatives, manifest["facts"]["draws"])

    def arrays(self, texts: GroupTexts, said: np.ndarray) -> Arrays:
        return relevance_files.shard_arrays(texts.keys, said)

    def _rows(self, shard: int, manifest: dict[str, Any]) -> range:
        size = manifest["shard_groups"]
        return range(shard * size, min((shard + 1) * size, len(self.groups)))


class VectorShards(Shards):
    """Vectors of every query and passage, from chosen layers and the final state."""

    unit, kept, cache, remedy = (
        "texts",
        "vectors",
        VectorCache,
        "distil from the teacher itself; where they are not finite, set teacher.dtype=bf16",
    )

    def __init__(
        self,
        config: Run,
        settings: TeacherRole,
        out: Path,
        groups: Groups,
        layers: Sequence[int],
        stored: Stored = "float16",
    ) -> None:
        """stored: what deviations are kept in; float32 loses nothing."""
        super().__init__(config, settings, out, groups)
        self.layers, self.stored = list(layers), np.dtype(stored)
        self._listing: Listing | None = None

    def facts(self) -> dict[str, Any]:
        return {"vectors": self.layers, "stored_in": self.stored.name}

    def sizes(self, asked: int | None, teacher: FrozenTeacher, manifest: dict[str, Any], world: int) -> dict[str, int]:
        """Texts of a shard, chosen as groups are; and how many there are of each kind."""
        index = self.listing(manifest["facts"]["draws"]).index(self.groups.alone)
        queries, passages = len(index["query_groups"]), len(index["passages"])
        size = asked or max(1, min(TEXTS, -(-passages // (4 * world))))
        return {"shard_texts": size, "queries": queries, "passages": passages, "width": teacher.scorer.features_width}

    def prepare(self, manifest: dict[str, Any]) -> None:
        """The index of all texts."""
        path = index_path(self.out)
        if path.exists() and damage(path, identity(manifest)) is None:
            return
        arrays = self.listing(manifest["facts"]["draws"]).index(self.groups.alone)
        with atomic(path) as temporary:
            save_arrays(temporary, arrays, identity(manifest))

    def describe(self, manifest: dict[str, Any]) -> str:
        texts = manifest["queries"] + manifest["passages"]
        size = texts * (len(self.layers) + 1) * manifest["width"] * self.stored.itemsize
        held = f"{manifest['queries']} queries and {manifest['passages']} passages"
        held = f"{texts} texts" if self.groups.alone else held
        return f"vectors of {held}, {size / 1e6:.1f} MB"

    def count(self, manifest: dict[str, Any]) -> int:
        return vector_files.shards(manifest)

    def path(self, shard: int, manifest: dict[str, Any]) -> Path:
        return vector_files.shard_path(self.out, *shard_of(manifest, shard))

    def reader(self, teacher: FrozenTeacher, encoder: TextEncoder, batch_size: int) -> Reader:
        return VectorReader(self.settings, teacher, encoder, batch_size, self.layers)

    def amount(self, shard: int, manifest: dict[str, Any]) -> int:
        size, (kind, place) = manifest["shard_texts"], shard_of(manifest, shard)
        return min(size, manifest[kind] - place * size)

    def load(self, manifest: dict[str, Any], shard: int | None) -> GroupTexts:
        """See `Shards`. A shard holds queries or passages alone."""
        if shard is None:
            return GroupTexts([], [], [])
        size, (kind, place) = manifest["shard_texts"], shard_of(manifest, shard)
        index, mine = mapped(index_path(self.out))[0], slice(place * size, (place + 1) * size)
        if kind == "queries":
            return GroupTexts([self.groups.pool(int(row)).query for row in index["query_groups"][mine]], [], [])
        if self.groups.alone:
            pools = [self.groups.pool(row) for row in index["passage_groups"][mine].tolist()]
            asking = [pool.role == "query" for pool in pools]
            return GroupTexts([], [], [pool.passages[0] for pool in pools], asking=asking)
        owners = np.unique(index["passage_groups"][mine]).tolist()
        read = GroupTexts.read(self.groups, owners, self.config.data.negatives, manifest["facts"]["draws"])
        texts = dict(zip(np.concatenate(read.keys).tolist(), read.passages, strict=True))
        return GroupTexts([], [], [texts[key] for key in index["passages"][mine].tolist()])

    def arrays(self, texts: GroupTexts, said: np.ndarray) -> Arrays:
        return vector_arrays(said, self.stored.type)

    def listing(self, draws: dict[str, Any] | None) -> Listing:
        """What all groups list, with what training may draw besides; looked through once."""

        def listed(row: int) -> tuple[int, np.ndarray]:
            query, keys = self.groups.listed(row)
            more = [drawn.keys for drawn in drawn_besides(self.groups, row, self.config.data.negatives, draws)]
            return query, np.concatenate([keys, *more])

        if self._listing is None:
            self._listing = Listing(listed(row) for row in range(len(self.groups)))
        return self._listing


def layers_to_keep(config: Run, asked: str) -> list[int]:
    """The layers of `--vectors`, ascending: numbers, last:K, all, final (none but it), or auto (what the losses read).

    Raises InputError for what names none, or one that the teacher lacks.
    """
    assert config.teacher is not None
    depth = int(read_model_config(config.teacher).get_text_config().num_hidden_layers)
    everything = list(range(depth))
    if asked == "auto":
        return config.losses.reach(depth)
    if asked in ("all", "final"):
        return everything if asked == "all" else []
    try:
        if asked.startswith("last:"):
            count = int(asked.removeprefix("last:"))
            chosen = everything[-count:] if 0 < count <= depth else [depth]
        else:
            chosen = sorted({int(layer) for layer in asked.split(",")})
    except ValueError:
        what, remedy = f"is {asked!r}", "give layers such as 9,10,11, or last:3, all, final or auto"
        raise InputError("--vectors", what, remedy) from None
    if not set(chosen) <= set(everything):
        raise InputError("--vectors", f"is {asked}, the teacher has {depth} layers", f"use 0 to {depth - 1}")
    return chosen
