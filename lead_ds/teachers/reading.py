"""The frozen teacher reading groups: long texts first, a text that several groups share once, every rank equally often.

Dimensions: T layers of the teacher, C candidates of a shard's groups, Q its queries, P its passages, B texts of a forward,
L tokens, D width.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.groups.group import Group, Groups, say_identical
from lead_ds.data.groups.mixture import MixedGroups
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught.vectors import VectorCache
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.longest_first import Untokenised, longest_first, once
from lead_ds.engine.distributed.agreement import agreed, check_agreement, check_shared
from lead_ds.engine.distributed.ranks import Ranks, closed_to_others
from lead_ds.engine.distributed.watchdog import waiting_ranks
from lead_ds.io.prefetch import ahead
from lead_ds.io.progress import Progress
from lead_ds.io.shards import turns
from lead_ds.models.as_read import check_room, sample
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.load import load_text, settled_model
from lead_ds.models.pairwise import compared, joined, pairs_of, states_of
from lead_ds.relevance import Scale, VectorFeatures
from lead_ds.settings.roles import TeacherRole
from lead_ds.settings.run import Run
from lead_ds.teachers.finite import refuse_not_finite
from lead_ds.teachers.frozen import FrozenTeacher
from lead_ds.teachers.identity import stored_scale

PAIRS_AT_ONCE = 32  # of which late interaction compares all tokens


@contextmanager
def opened(config: Run, settings: TeacherRole, out: Path) -> Iterator[tuple[Ranks, Run, Groups, TextEncoder]]:
    """The ranks that read together, the configuration with the teacher's own lengths, the training groups, and how the teacher
    reads texts; `out`: where all of them write.

    Every process calls this. Raises InputError on all of them where they differ, or an input cannot be read.
    """
    with waiting_ranks() as ranks, closed_to_others():
        check_agreement(config, False, ranks)
        check_shared(out, ranks)
        teacher = agreed(ranks, lambda: settled_model(settings))
        groups, encoder = agreed(ranks, lambda: (open_groups(config.data), load_text(teacher)))
        agreed(ranks, lambda: check_room(encoder, "teacher", *sample(groups)))
        if ranks.main:
            say_identical(groups)
        yield ranks, config.model_copy(update={"teacher": teacher}), groups, encoder  # type: ignore[attr-defined]


@dataclass
class GroupTexts:
    """Texts of groups: each group's query, and its candidates by key."""

    queries: list[str]
    keys: list[np.ndarray]
    passages: list[str]  # C, group after group
    rows: Sequence[int] = ()  # of the groups
    asking: list[bool] | None = None  # C, of texts alone: which are read as queries

    @cached_property
    def owners(self) -> np.ndarray:
        """The group of each candidate, int64 [C]."""
        return np.repeat(np.arange(len(self.keys)), [len(keys) for keys in self.keys])

    @classmethod
    def read(cls, groups: Groups, rows: Sequence[int], negatives: int, draws: dict[str, Any] | None) -> GroupTexts:
        """Every passage that a draw of these groups may choose."""
        shard = cls([], [], [], rows)
        for row in rows:
            pool = groups.pool(row)
            found = dict(zip(pool.keys.tolist(), pool.passages, strict=True))
            for drawn in drawn_besides(groups, row, negatives, draws):
                found |= dict(zip(drawn.keys.tolist(), drawn.passages, strict=True))
            shard.queries.append(pool.query)
            shard.keys.append(np.array(list(found), np.int64))
            shard.passages += found.values()
        return shard

    @classmethod
    def drawn(cls, groups: Groups, rows: Sequence[int], seed: int) -> GroupTexts:
        """One draw of each of these groups, the positive first."""
        draws = [groups.draw(row, seed, epoch=0) for row in rows]
        passages = [passage for drawn in draws for passage in drawn.passages]
        return cls([drawn.query for drawn in draws], [drawn.keys for drawn in draws], passages)


def drawn_besides(groups: Groups, row: int, negatives: int, draws: dict[str, Any] | None) -> Iterator[Group]:
    """A group's draws of the epochs of `draws`, where its pool alone does not decide which passages they take."""
    if draws is not None and groups.offered(row) < negatives:
        epochs = draws["epochs"]
        if isinstance(epochs, list):  # of a mixture, by set
            assert isinstance(groups, MixedGroups)
            epochs = epochs[groups.set_of(row)[0]]
        for epoch in range(epochs):
            yield groups.draw(row, draws["seed"], epoch)


class Reader(ABC):
    """The teacher reading a shard: long texts first, a text that several groups share once."""

    def __init__(self, settings: TeacherRole, teacher: FrozenTeacher, encoder: TextEncoder, batch_size: int) -> None:
        self.teacher, self.encoder, self.batch_size = teacher, encoder, batch_size
        self.scale: Scale = stored_scale(settings.kind, settings.scale)
        self.pairs = KINDS[settings.kind].reads_pairs

    @abstractmethod
    def look(self, tokens: Tokens) -> Tensor:
        """What the teacher gives for texts or pairs on its device: one forward."""

    @abstractmethod
    def said(self, shard: GroupTexts, tell: Callable[[float], None]) -> Any:
        """What `read` gives; `tell` takes the part that is done."""

    def units(self, shard: GroupTexts) -> int:
        """How much of what is counted for the user a shard holds."""
        return len(shard.queries)

    def forwards(self, shard: GroupTexts) -> int:
        """How often the model will run."""
        if self.pairs:
            return -(-len(shard.passages) // self.batch_size)
        return sum(-(-len(set(texts)) // self.batch_size) for texts in (shard.queries, shard.passages))

    def read(self, shard: GroupTexts, forwards: int, meter: Progress) -> Any:
        """The teacher's output for a shard, by `forwards` runs of the model."""
        done = 0

        def tell(part: float) -> None:
            nonlocal done
            now = int(part * self.units(shard) + 1e-9)
            meter.advance(now - done)
            done = now

        out = self.said(shard, tell)
        for _ in range(forwards - self.forwards(shard)):
            self.look(self._tokens_of_pairs([("a", "a")]) if self.pairs else self.encoder.queries(["a"]))
        return out

    def run_pairs(self, shard: GroupTexts, tell: Callable[[float], None]) -> Iterator[tuple[list[int], Tensor]]:
        """(candidates, what was looked at) of every candidate with its query, batch after batch."""
        pairs = [(shard.queries[owner], text) for owner, text in zip(shard.owners, shard.passages, strict=True)]
        read = 0
        for places, _, looked in self.run(pairs, self._tokens_of_pairs):
            yield places, looked
            read += len(places)
            tell(read / len(pairs))

    def run(
        self, items: Sequence[Any], tokenize: Callable[[list[Any]], Tokens]
    ) -> Iterator[tuple[list[int], Tokens, Tensor]]:
        """(places in items, their tokens on the device, what was looked at), batch after batch, the longest first."""

        def load(places: range) -> Untokenised[Any]:
            return Untokenised(items[places.start : places.stop], tokenize)

        for places, tokens in longest_first(len(items), load, batch_size=self.batch_size):
            moved = {name: x.to(self.teacher.device) for name, x in tokens.items()}
            looked = self.look(moved)
            refuse_not_finite(self.teacher, looked, moved, [items[place] for place in places])
            yield places, moved, looked

    def _tokens_of_pairs(self, pairs: Sequence[tuple[str, str]]) -> Tokens:
        return self.encoder.pairs([query for query, _ in pairs], [passage for _, passage in pairs])


class RelevanceReader(Reader):
    """Reads the relevance of every candidate from every layer: float32 [C, T + 1]."""

    def look(self, tokens: Tokens) -> Tensor:
        """Scores [T + 1, B] of pairs, vectors [T + 1, B, D] or token states [T + 1, B, L, D] of texts."""
        return self.teacher.all_layers(tokens)

    def said(self, shard: GroupTexts, tell: Callable[[float], None]) -> np.ndarray:
        return (self._of_pairs if self.pairs else self._of_texts)(shard, tell)

    def _of_pairs(self, shard: GroupTexts, tell: Callable[[float], None]) -> np.ndarray:
        out = self._empty(shard)
        for places, scores_TB in self.run_pairs(shard, tell):
            out[places] = scores_TB.float().T.cpu().numpy()
        return out

    def _of_texts(self, shard: GroupTexts, tell: Callable[[float], None]) -> np.ndarray:
        out = self._empty(shard)
        asked, query_of_group = once(shard.queries)
        texts, passage_of = once(shard.passages)
        if not asked:
            return out
        queries, query_of = joined(self.run(asked, self.encoder.queries)), query_of_group[shard.owners]
        by_passage = np.argsort(passage_of, kind="stable")
        bounds = np.searchsorted(passage_of[by_passage], np.arange(len(texts) + 1))
        read = 0
        for places, tokens, states in self.run(texts, self.encoder.passages):
            slots, own = pairs_of(places, by_passage, bounds)
            passages = states_of(tokens, states)
            for some, relevance in compared(queries, passages, query_of[slots], own, self.scale, PAIRS_AT_ONCE):
                out[slots[some]] = relevance.cpu().numpy()
            read += len(places)
            tell(read / len(texts))
        return out

    def _empty(self, shard: GroupTexts) -> np.ndarray:
        return np.empty((len(shard.passages), self.teacher.num_layers + 1), np.float32)


class VectorReader(Reader):
    """Reads the vectors of chosen layers and of the final state: float32 [S, K + 1, D] of a shard of queries or passages."""

    def __init__(
        self,
        settings: TeacherRole,
        teacher: FrozenTeacher,
        encoder: TextEncoder,
        batch_size: int,
        layers: Sequence[int],
    ) -> None:
        super().__init__(settings, teacher, encoder, batch_size)
        self.layers = layers

    def units(self, shard: GroupTexts) -> int:
        return len(shard.queries) + len(shard.passages)

    def forwards(self, shard: GroupTexts) -> int:
        return -(-len(set(self._texts(shard))) // self.batch_size)

    def look(self, tokens: Tokens) -> Tensor:
        """[K + 1, B, D]."""
        return self.teacher.read(tokens, self.layers)

    def said(self, shard: GroupTexts, tell: Callable[[float], None]) -> np.ndarray:
        texts, rows = once(self._texts(shard))
        read, done = np.empty((0, 0, 0), np.float32), 0

        def tokenize(some: list[Any]) -> Tokens:
            if shard.asking is not None:
                return self.encoder.alone([text for text, _ in some], [asks for _, asks in some])
            return self.encoder.queries(some) if shard.queries else self.encoder.passages(some)

        for places, _, vectors_KBD in self.run(texts, tokenize):
            found = vectors_KBD.float().transpose(0, 1).cpu().numpy()
            if not len(read):
                read = np.empty((len(texts), *found.shape[1:]), np.float32)
            read[places] = found
            done += len(places)
            tell(done / len(texts))
        return read[rows] if len(texts) < len(rows) else read

    def _texts(self, shard: GroupTexts) -> Sequence[Any]:
        """The texts of a shard; of texts alone, each with whether it is asking."""
        if shard.asking is not None:
            return [*zip(shard.passages, shard.asking, strict=True)]
        return shard.queries or shard.passages


class ComparingReader(Reader):
    """Reads no text: compares vectors that were kept of all of them. Relevance as that of `RelevanceReader`."""

    def __init__(self, vectors: VectorCache, scale: Scale) -> None:
        self.vectors, self.scale = vectors, scale

    def forwards(self, shard: GroupTexts) -> int:
        return 0

    def look(self, tokens: Tokens) -> Tensor:
        """See `Reader`: never called."""
        raise NotImplementedError

    def said(self, shard: GroupTexts, tell: Callable[[float], None]) -> np.ndarray:
        found = [np.empty((0, len(self.vectors.layers) + 1), np.float32)]
        for place, (row, keys) in enumerate(zip(shard.rows, shard.keys, strict=True)):
            arrays = {name: torch.from_numpy(x) for name, x in self.vectors.said([row], [keys]).items()}
            features = VectorFeatures(arrays["queries"], arrays["passages"], self.scale)
            found.append(features.group_relevance(len(keys)).logits[:, 0].T.numpy())
            tell((place + 1) / len(shard.keys))
        return np.concatenate(found)


def write_in_turns(
    todo: Sequence[int],
    ranks: Ranks,
    reader: Reader,
    load: Callable[[int | None], GroupTexts],
    save: Callable[[int, GroupTexts, Any], None],
    meter: Progress,
) -> None:
    """Read and save the shards of `todo`, every rank its own; they take turns together, for a sharded teacher needs them
    all. `load` of None: no texts."""
    mine = turns(todo, ranks.rank, ranks.world)
    with ThreadPoolExecutor(1) as pool:
        for shard, texts in zip(mine, ahead(pool, load, iter(mine), 1), strict=True):
            forwards = max(ranks.all(reader.forwards(texts)))
            said = reader.read(texts, forwards, meter)
            if shard is not None:
                agreed(ranks, lambda: save(shard, texts, said))  # noqa: B023 - called at once
            else:
                agreed(ranks, lambda: None)


def say(text: str) -> None:
    """Tell the user, on stderr."""
    print(text, file=sys.stderr, flush=True)
