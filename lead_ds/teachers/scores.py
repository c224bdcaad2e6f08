"""Scores that come with the training file, of whatever gave them: a model that was served, an ensemble, people.

Dimensions: A micro-batches of B queries, N passages of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from lead_ds.data.groups.group import Group, Groups
from lead_ds.data.reads import ModelBatch, Reads
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.relevance import Scale, ScoreFeatures
from lead_ds.teachers.teacher import TEACHERS, Lesson, Teacher, TeacherSettings, TeacherView


class ScoresSettings(TeacherSettings):
    """Settings of scores of the training file."""

    kind: Literal["scores"]
    scale: Literal["none", "standard"] = Field("none", description="as the file gives them, or z-scores per query")


class GroupScores:
    """The scores that groups carry. Looks at no text."""

    reads_texts = False

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def read(self, rows: np.ndarray, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """scores float32 [len(rows), N]. Raises InputError for a passage that has none."""
        scores = [np.full(len(group.keys), np.nan) if group.scores is None else group.scores for group in groups]
        scores_QN = np.stack(scores).astype(np.float32)
        missing = np.argwhere(~np.isfinite(scores_QN))
        if len(missing):
            query, place = missing[0].tolist()
            what = f"passage {groups[query].passage_ids[place]!r} has no score"
            raise InputError(self.groups.where(int(rows[query])), what, "add it, or take the passage out")
        return {"scores": scores_QN}


@TEACHERS.register("scores")
class ScoresTeacher(Teacher):
    """The file's own scores: the final relevance of each query's own passages, and no layers.

    Positives and negatives are drawn among those that have a score; a group with too few of them is refused at start.
    """

    Settings = ScoresSettings
    gives = frozenset({"final"})
    num_layers, placement = 0, "scores"

    def __init__(self, groups: Groups, scale: Scale, device: torch.device) -> None:
        self.groups, self.scale, self.device = groups, scale, device

    @classmethod
    def drawn(cls, groups: Groups) -> Groups:
        """See `Teacher`: only passages that have a score."""
        return groups.scored()

    @classmethod
    def reads(cls, lesson: Lesson, groups: Groups, ranks: Ranks) -> Reads:
        """See `Teacher`: the scores of each passage drawn."""
        if lesson.data.negatives == 0:
            what = "is 0: scores are compared over a query's own passages, and there is but one"
            raise InputError("data.negatives", what, "set it to 1 or more")
        return Reads(lookup=GroupScores(groups))

    @classmethod
    def open(cls, lesson: Lesson, reads: Reads, sample: Callable[[], list[ModelBatch]], ranks: Ranks) -> ScoresTeacher:
        assert isinstance(reads.lookup, GroupScores)
        return cls(reads.lookup.groups, lesson.teacher.scale, ranks.device)

    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        """Final relevance of a window's groups [1, A * B, N], float32."""
        found = [chunk.to(self.device).looked_up for chunk in chunks]
        return TeacherView(ScoreFeatures(torch.cat([one["scores"] for one in found if one])[None], self.scale))

    def describe(self) -> str:
        return f"teacher: the scores in {self.groups.path}; teacher losses compare a query with its own passages"

    def facts(self) -> dict[str, Any]:
        return {"placement": self.placement, "path": str(self.groups.path), "kind": "scores", "parameter_bytes": 0}
