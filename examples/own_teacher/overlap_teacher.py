"""A teacher of another package: `pip install examples/own_teacher`, then `teacher: {kind: overlap}` in a configuration.

It scores a passage by the words that it shares with the query, rare ones more, as BM25 does: no model, no GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from lead_ds.data.groups.group import Group, Groups
from lead_ds.data.reads import ModelBatch, Reads
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.relevance import ScoreFeatures
from lead_ds.teachers.teacher import Lesson, Teacher, TeacherSettings, TeacherView

SEEN = 2000  # groups whose passages are counted


class OverlapSettings(TeacherSettings):
    """Settings of word overlap: the section `teacher` of a run."""

    kind: Literal["overlap"]
    k1: float = Field(1.2, gt=0, description="how soon a repeated word adds nothing more")


class Overlap:
    """Scores groups by their texts, in whatever process prepares them."""

    reads_texts = True

    def __init__(self, groups: Groups, k1: float) -> None:
        pools = [groups.pool(row) for row in range(min(SEEN, len(groups)))]
        passages = {passage for pool in pools for passage in pool.passages}
        self.count, self.k1 = len(passages), k1
        self.having = Counter(word for passage in passages for word in set(words(passage)))

    def read(self, rows: np.ndarray, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """scores float32 [len(groups), N]."""
        scores = [[self.score(group.query, passage) for passage in group.passages] for group in groups]
        return {"scores": np.array(scores, np.float32)}

    def score(self, query: str, passage: str) -> float:
        """How much a passage has of the query's words."""
        found, total = Counter(words(passage)), 0.0
        for word in set(words(query)):
            rare = math.log(1 + (self.count - self.having[word] + 0.5) / (self.having[word] + 0.5))
            total += rare * found[word] * (self.k1 + 1) / (found[word] + self.k1)
        return total


class OverlapTeacher(Teacher):
    """Final relevance of each query's own passages, and no layers."""

    Settings = OverlapSettings
    gives = frozenset({"final"})
    num_layers, placement = 0, "overlap"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def reads(cls, lesson: Lesson, groups: Groups, ranks: Ranks) -> Reads:
        """See `Teacher`: scores of their texts."""
        return Reads(lookup=Overlap(groups, lesson.teacher.k1))

    @classmethod
    def open(cls, lesson: Lesson, reads: Reads, sample: Callable[[], list[ModelBatch]], ranks: Ranks) -> OverlapTeacher:
        """See `Teacher`."""
        return cls(ranks.device)

    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        """Final relevance [1, Q, N] of the queries of all chunks."""
        found = [chunk.to(self.device).looked_up for chunk in chunks]
        return TeacherView(ScoreFeatures(torch.cat([one["scores"] for one in found if one])[None]))

    def describe(self) -> str:
        """See `Teacher`."""
        return "teacher: words that query and passage share"

    def facts(self) -> dict[str, Any]:
        """See `Teacher`."""
        return {"placement": self.placement, "path": "words", "kind": "overlap"}


def words(text: str) -> list[str]:
    """Its words, in lower case."""
    return re.findall(r"\w+", text.lower())
