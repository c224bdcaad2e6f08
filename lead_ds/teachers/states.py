"""A frozen teacher's pooled states of training groups: read once, on any number of ranks, for a lens to be fitted on.

A folder with a manifest and shards of groups, one safetensors file each, mapped into memory:

    positive   int64 [G]                  the passage that each group is about, by key
    states     float16 [T, G, N, D]       a model of pairs: what its head reads of each layer
    own        float32 [T + 1, G, N]      and what the head makes of it, of the layers and the final state
    queries    float16 [T + 1, G, D]      a dual encoder: its vectors, before they are given unit length
    passages   float16 [T + 1, G, N, D]

T layers, G groups of N passages (the positive first), D width, B texts or pairs of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.groups.group import Groups
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.longest_first import once
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import RunError
from lead_ds.io.facts import check_facts, digest
from lead_ds.io.files import atomic, read_json, write_json
from lead_ds.io.progress import progress
from lead_ds.io.shards import MANIFEST, damage, mapped, refuse_strangers, save_arrays, unfinished
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.settings.roles import TeacherRole
from lead_ds.settings.run import Run
from lead_ds.teachers.frozen import build_teacher, teacher_dtype
from lead_ds.teachers.identity import data_facts
from lead_ds.teachers.lens import lens_identity
from lead_ds.teachers.reading import GroupTexts, Reader, say, write_in_turns
from lead_ds.teachers.teacher import Lesson

SHARD_GROUPS = 64


class States:
    """States on disk, a layer at a time."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.pairs: bool = KINDS[manifest["facts"]["teacher"]["kind"]].reads_pairs
        self._shards = [mapped(path)[0] for path in shard_paths(folder, manifest)]

    @property
    def num_layers(self) -> int:
        """T."""
        return len(self._shards[0]["own"]) - 1 if self.pairs else len(self._shards[0]["queries"]) - 1

    @property
    def width(self) -> int:
        """D."""
        return int(self._shards[0]["states" if self.pairs else "queries"].shape[-1])

    @property
    def positives(self) -> np.ndarray:
        """Key of each group's positive, int64 [G]."""
        return np.concatenate([shard["positive"] for shard in self._shards])

    def layer(self, name: str, layer: int, device: torch.device) -> Tensor:
        """An array's part of one layer (-1: the final state), in float32."""
        return torch.from_numpy(np.concatenate([shard[name][layer] for shard in self._shards])).to(device).float()


def read_states(
    config: Run, folder: Path, groups: Groups, encoder: TextEncoder, most: int, ranks: Ranks, *, quiet: bool = False
) -> States:
    """The states of at most `most` groups, drawn by the seed; what an earlier call has read is kept. Every rank calls this.

    Raises InputError where `folder` holds other states, RunError for states that are not finite numbers.
    """
    assert config.teacher is not None
    settings = config.teacher
    count = min(most, len(groups))
    manifest = ranks.from_main(agreed(ranks, lambda: _begin(config, folder, groups, encoder, count, ranks)))
    facts = manifest["facts"]
    paths, owner = shard_paths(folder, manifest), digest(facts)
    todo = ranks.from_main(unfinished(paths, lambda path: damage(path, owner), say) if ranks.main else [])
    if todo:
        torch.manual_seed(config.seed)  # a teacher of random weights is the same on every rank
        own_head = config.model_copy(update={"teacher": settings.model_copy(update={"lens": "head"})})
        teacher = build_teacher(Lesson.of(own_head), ranks)
        check_vocabulary(teacher.scorer, encoder, settings.path)
        if ranks.main:
            write_json(folder / MANIFEST, manifest | {"normalize": bool(getattr(teacher.scorer, "normalize", False))})
            if not quiet:
                say(
                    f"teacher {settings.path}: {teacher.num_layers} layers, {teacher.placement}; reading {count} groups once"
                )
        rows = sorted(Random(f"lens {config.seed}").sample(range(len(groups)), count))
        window = config.train.batch_size * config.train.accumulation * (1 + config.data.negatives)
        reader = StateReader(settings, teacher, encoder, settings.batch_size or window)

        def load(shard: int | None) -> GroupTexts:
            own = [] if shard is None else rows[shard * SHARD_GROUPS : (shard + 1) * SHARD_GROUPS]
            return GroupTexts.drawn(groups, own, config.seed)

        total = sum(min(SHARD_GROUPS, count - shard * SHARD_GROUPS) for shard in todo[ranks.rank :: ranks.world])
        with progress("reading states", total, "groups", shown=ranks.main and not quiet and total > 0) as meter:
            write_in_turns(todo, ranks, reader, load, partial(_save, folder, facts), meter)
    ranks.barrier()
    return agreed(ranks, lambda: States(folder, read_json(folder / MANIFEST, "run lead-ds fit-lens again")))


def shard_paths(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The files of a folder of states."""
    return [folder / f"states-{i:05d}.safetensors" for i in range(-(-manifest["facts"]["groups"] // SHARD_GROUPS))]


def _begin(config: Run, folder: Path, groups: Groups, encoder: TextEncoder, count: int, ranks: Ranks) -> dict[str, Any]:
    if not ranks.main:
        return {}
    assert config.teacher is not None
    facts = {
        "version": 1,
        "teacher": lens_identity(config.teacher, encoder, config.seed),
        "computed_in": str(teacher_dtype(config.teacher, ranks.device)).removeprefix("torch."),
        "data": data_facts(groups),
        "groups": count,
        "negatives": config.data.negatives,
        "seed": config.seed,
    }
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, "delete the folder")
        check_facts(folder, "holds states", manifest.get("facts"), facts)
        return manifest
    refuse_strangers(folder, "states-*.safetensors", "delete the folder")
    return {"facts": facts}


def _save(folder: Path, facts: dict[str, Any], shard: int, texts: GroupTexts, arrays: dict[str, np.ndarray]) -> None:
    path = shard_paths(folder, {"facts": facts})[shard]
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise RunError(
            path,
            "the teacher's states are no finite numbers in half precision",
            "set teacher.dtype=bf16, or teacher.lens=head",
        )
    arrays["positive"] = np.array([keys[0] for keys in texts.keys], np.int64)
    with atomic(path) as temporary:
        save_arrays(temporary, arrays, digest(facts))


class Recording:
    """Looks on as a teacher's layers are read, and changes nothing."""

    own: Tensor
    states: Sequence[Tensor]

    def __call__(self, own: Tensor, states: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        self.own, self.states = own, states
        return own


class StateReader(Reader):
    """Reads what `States` holds, but the positives."""

    def __init__(self, settings: TeacherRole, teacher: Any, encoder: TextEncoder, batch_size: int) -> None:
        super().__init__(settings, teacher, encoder, batch_size)
        self.recording = Recording()
        teacher.scorer.lens = self.recording

    def look(self, tokens: Tokens) -> Tensor:
        """The pooled states [T + 1, B, D]."""
        self.teacher.all_layers(tokens)
        return torch.stack(list(self.recording.states))

    def said(self, shard: GroupTexts, tell: Callable[[float], None]) -> dict[str, np.ndarray]:
        return (self._of_pairs if self.pairs else self._of_texts)(shard, tell)

    def _of_pairs(self, shard: GroupTexts, tell: Callable[[float], None]) -> dict[str, np.ndarray]:
        layers, pairs, groups = self.teacher.num_layers, len(shard.passages), len(shard.queries)
        if not pairs:
            return {}
        states = np.empty((layers, pairs, self.teacher.scorer.width), np.float16)
        own = np.empty((layers + 1, pairs), np.float32)
        for places, states_TBD in self.run_pairs(shard, tell):
            states[:, places] = states_TBD[:-1].half().cpu().numpy()
            own[:, places] = self.recording.own.float().cpu().numpy()
        shape = groups, pairs // groups
        return {"states": states.reshape(layers, *shape, -1), "own": own.reshape(-1, *shape)}

    def _of_texts(self, shard: GroupTexts, tell: Callable[[float], None]) -> dict[str, np.ndarray]:
        if not shard.passages:
            return {}
        queries = self._vectors(shard.queries, self.encoder.queries, lambda part: tell(part / (1 + self._size(shard))))
        first = 1 / (1 + self._size(shard))
        passages = self._vectors(shard.passages, self.encoder.passages, lambda part: tell(first + (1 - first) * part))
        groups = len(shard.queries)
        return {"queries": queries, "passages": passages.reshape(len(passages), groups, -1, passages.shape[-1])}

    def _size(self, shard: GroupTexts) -> float:
        return len(shard.passages) / len(shard.queries)

    def _vectors(
        self, texts: list[str], tokenize: Callable[[list[str]], Tokens], tell: Callable[[float], None]
    ) -> np.ndarray:
        """float16 [T + 1, texts, D], an equal text read once."""
        distinct, place_of = once(texts)
        found: np.ndarray | None = None
        read = 0
        for places, _, states_TBD in self.run(distinct, tokenize):
            if found is None:
                found = np.empty((len(states_TBD), len(distinct), states_TBD.shape[-1]), np.float16)
            found[:, places] = states_TBD.half().cpu().numpy()
            read += len(places)
            tell(read / len(distinct))
        assert found is not None
        return found[:, place_of]
