"""The student's vectors drawn to the teacher's: what a text means, with neither a label nor another text beside it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, normalize

from lead_ds.errors import InputError
from lead_ds.losses.loss import Loss, LossSettings, LossShape, register
from lead_ds.losses.vectors import Vectors, final_vectors, precise
from lead_ds.losses.views import Views

Distance = Literal["cosine", "l2", "mse"]
Texts = Literal["queries", "positives", "negatives"]


class EmbeddingSettings(LossSettings):
    """Distance between the student's and the teacher's final vectors of the same text."""

    distance: Distance = Field(
        "cosine", description="cosine: 1 - cos; l2: length of the difference; mse: its mean square"
    )
    of: list[Texts] = Field(["queries", "positives", "negatives"], min_length=1, description="each kind counts alike")
    into: Literal["teacher", "truncate", "same"] = Field(
        "teacher",
        description="teacher: the student's vectors through a linear map, trained along and dropped; truncate: the "
        "teacher's first dimensions, as many as the student has, at length 1; same: as they are, of equal widths",
    )

    @field_validator("of")
    @classmethod
    def _each_once(cls, of: list[Texts]) -> list[Texts]:
        if len(set(of)) < len(of):
            raise ValueError("names a kind of text twice")
        return of


def embedding_distance(student_BD: Tensor, teacher_BD: Tensor, distance: Distance = "cosine") -> Tensor:
    """Mean over texts of 1 - cos(s, t), of |s - t|, or of |s - t|^2 / D.

    student, teacher: [B, D] of the same B texts, B >= 1. Returns a float32 scalar (float64 for float64); gradient to both.

    >>> embedding_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), "l2").item()
    5.0
    """
    s_BD, t_BD = precise(student_BD), precise(teacher_BD)
    if distance == "cosine":
        return (1 - cosine_similarity(s_BD, t_BD, dim=-1)).mean()
    if distance == "l2":
        return torch.linalg.vector_norm(s_BD - t_BD, dim=-1).mean()
    return (s_BD - t_BD).square().mean()


@register
class Embedding(Loss):
    """L = mean over kinds of text of mean_x d(W s(x), t(x)), of final vectors s [D_s] and t [D_t]; d: see `embedding_distance`.

    Into `teacher`: W [D_t, D_s] is learned, and dropped after training. It begins as the identity where widths are equal,
    else as a random semi-orthogonal map, which keeps angles where the teacher is the wider. Into `truncate`: no W; t is its
    own first D_s dimensions over their length. Into `same`: no W, D_s = D_t. The teacher gets no gradient.
    Each process compares its own texts. LEAF, arXiv 2509.12539; EmbedDistill, arXiv 2301.12005.

    Raises InputError for widths that `into` cannot compare, and for models without vectors of texts.

    >>> from lead_ds.losses import ModelFacts, Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])))
    >>> teacher = Side(VectorFeatures(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 0.0]]])))
    >>> facts = ModelFacts("dual_encoder", layers=3, width=2)
    >>> loss = Embedding(Embedding.set(weight=1), LossShape(facts, facts))
    >>> loss(Views(student, teacher, Scope(group=1))).item()  # the query is alike, its passage at a right angle
    0.5
    """

    name, Settings, needs = "embedding", EmbeddingSettings, frozenset({"features"})

    def __init__(self, settings: EmbeddingSettings, shape: LossShape) -> None:
        super().__init__(settings, shape)
        student, teacher = shape.student.width, shape.teacher.width if shape.teacher else None
        if student is None or teacher is None:
            who = "student" if student is None else "teacher"
            what = f"compares vectors, and the {who} has none"
            raise InputError("losses.embedding", what, "set its weight to 0, or name a model of vectors")
        _check_widths(settings.into, student, teacher)
        # A weight of the loss itself, not of a module in it: ZeRO-3 gathers it for this forward, which may then cast it.
        self.map = nn.Parameter(_begin(student, teacher)) if settings.into == "teacher" else None

    def forward(self, views: Views) -> Tensor:
        """A scalar."""
        student = self._kinds(final_vectors(views.student, "student", self.name), views.scope.group)
        teacher = self._kinds(final_vectors(views.teacher, "teacher", self.name), views.scope.group)
        distances = [self._distance(s, t) for s, t in zip(student, teacher, strict=True) if len(s)]
        if not distances:
            raise InputError(
                "losses.embedding.of", "names negatives alone, and there are none", "add queries, or positives"
            )
        return torch.stack(distances).mean()

    def _kinds(self, vectors: Vectors, group: int) -> list[Tensor]:
        p_QND = vectors.passages.unflatten(0, (-1, group))
        kinds = {"queries": vectors.queries, "positives": p_QND[:, 0], "negatives": p_QND[:, 1:].flatten(0, 1)}
        return [kinds[kind] for kind in self.settings.of]

    def _distance(self, s_BD: Tensor, t_BD: Tensor) -> Tensor:
        width = s_BD.shape[1]  # fewer than the student's where that is trained at several widths
        if self.map is not None:
            s_BD = linear(s_BD, self.map[:, :width].to(s_BD.dtype))
        elif width < t_BD.shape[1]:
            t_BD = normalize(t_BD[:, :width], dim=-1)
        return embedding_distance(s_BD, t_BD, self.settings.distance)


def _check_widths(into: str, student: int, teacher: int) -> None:
    where, widths = "losses.embedding.into", f"the student's vectors have {student} dimensions, the teacher's {teacher}"
    if into == "same" and student != teacher:
        remedy = "set it to teacher" + (", or truncate" if student < teacher else "")
        raise InputError(where, f"same needs equal widths: {widths}", f"{remedy}, or set student.projection: {teacher}")
    if into == "truncate" and student > teacher:
        raise InputError(where, f"truncate needs a teacher as wide as the student: {widths}", "set it to teacher")


def _begin(student: int, teacher: int) -> Tensor:
    """[D_t, D_s]: the identity, or with orthonormal rows or columns."""
    if student == teacher:
        return torch.eye(student)
    return nn.init.orthogonal_(torch.empty(teacher, student))
