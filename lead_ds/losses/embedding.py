"""The student's vectors drawn to the teacher's: what a text means, with neither a label nor another text beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, overload

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, normalize

from lead_ds.errors import InputError
from lead_ds.losses.loss import Loss, LossSettings, LossShape, Need, register
from lead_ds.losses.selection import NO_LAYERS, Depths, Given, Layers
from lead_ds.losses.vectors import Moments, Vectors, final_vectors, layer_vectors, precise
from lead_ds.losses.views import Views
from lead_ds.settings.base import NonNegative, Positive, Section, each_once
from lead_ds.settings.modes import in_modes, refusal

Distance = Literal["cosine", "l2", "mse"]
Texts = Literal["queries", "positives", "negatives"]


class EmbeddingSettings(LossSettings):
    """Distance between the student's and the teacher's vectors of the same text."""

    distance: Distance = Field(
        "cosine", description="cosine: 1 - cos; l2: length of the difference; mse: its mean square"
    )
    of: Annotated[list[Texts], Field(min_length=1), each_once("a kind of text")] = Field(
        ["queries", "positives", "negatives"], description="each kind counts alike"
    )
    into: Any
    teacher_layers: list[NonNegative] = Field(
        [],
        description="compare these layers' vectors as well, paired in order; each pair counts as the final vectors do",
    )
    student_layers: list[NonNegative] = Field([])

    @model_validator(mode="after")
    def _paired(self) -> EmbeddingSettings:
        if len(self.teacher_layers) != len(self.student_layers):
            what = "and student_layers are paired in order and must be equally many"
            raise refusal("embedding", "teacher_layers", self.teacher_layers, what, "name as many of each")
        return self

    def pair(self, key: str, models: Depths, step: int) -> Layers:
        return self._layers.pair(key, models, step) if self.teacher_layers else NO_LAYERS

    def reach(self, key: str, teacher_layers: int) -> list[int]:
        return self._layers.reach(key, teacher_layers)

    @property
    def count(self) -> int:
        return len(self.teacher_layers)

    @property
    def _layers(self) -> Given:
        return Given(teacher_layers=self.teacher_layers, student_layers=self.student_layers)


class IntoTeacher(EmbeddingSettings):
    """The student's vectors through a linear map into the teacher's space, trained along."""

    into: Literal["teacher"] = "teacher"
    keep: bool = Field(
        False,
        description="the map is the student's last layer, which every loss reads through and which is saved with it: it "
        "serves in the teacher's space. false: the map is dropped after training",
    )
    start: Literal["orthogonal", "ridge"] = Field(
        "orthogonal",
        description="of the map: the identity where widths are equal, else random and orthogonal; or the closed form on a sample",
    )
    sample: Positive = Field(
        4096, description="start: ridge; texts of the run's first windows that it is fitted on, at least"
    )

    @model_validator(mode="after")
    def _sampled(self) -> IntoTeacher:
        if self.start != "ridge" and self.sample != type(self).model_fields["sample"].default:
            what = f"is ignored by start: {self.start}"
            raise refusal("embedding", "sample", self.sample, what, "take it out, or set start: ridge")
        return self


class IntoPCA(EmbeddingSettings):
    """The teacher's vectors in their main directions, as many as the student has dimensions, at length 1."""

    into: Literal["pca"] = "pca"
    keep: bool = Field(
        False,
        description="the student gets a last layer, saved with it, that maps its vectors onto those directions. Its first "
        "dimensions then carry the most from the first step on, which student.dims builds upon",
    )
    start: Literal["orthogonal", "ridge"] = Field(
        "ridge",
        description="of that layer: the closed form on the sample; or the directions themselves, for a student that was cut out "
        "of the teacher and is in its space already",
    )
    sample: Positive = Field(4096, description="texts of the run's first windows that the basis is fitted on, at least")

    @model_validator(mode="after")
    def _begun(self) -> IntoPCA:
        if self.start != "ridge" and not self.keep:
            raise refusal(
                "embedding", "start", self.start, "is ignored by keep: false", "take it out, or set keep: true"
            )
        return self


class IntoTruncate(EmbeddingSettings):
    """The teacher's first dimensions, as many as the student has, at length 1."""

    into: Literal["truncate"] = "truncate"


class IntoSame(EmbeddingSettings):
    """Vectors as they are, of equal widths."""

    into: Literal["same"] = "same"


INTO: dict[str, type[Section]] = {"teacher": IntoTeacher, "pca": IntoPCA, "truncate": IntoTruncate, "same": IntoSame}


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

    Into `teacher`: W [D_t, D_s] is learned, and dropped after training, or kept: then it is the student's own last layer,
    and W is the identity here. It begins as the identity where widths are equal, else as a random semi-orthogonal map,
    which keeps angles where the teacher is the wider. Or it begins in closed form: ridge regression of t on s. Into `pca`:
    t is B^T t over its length, B [D_t, D_s] the main directions of a sample of t, about the origin. There is no W. Where
    it is kept, B^T times that ridge regression, or B^T itself, is the
    student's last layer. Into `truncate`: no W; t is its own first D_s
    dimensions over their length. Into `same`: no W, D_s = D_t. The teacher gets no gradient.
    Layers that are named are compared in the same way, each pair with a W of its own, and averaged with the final vectors.
    Each process compares its own texts. LEAF, arXiv 2509.12539; EmbedDistill, arXiv 2301.12005; TALAS, arXiv 2606.21851.

    Raises InputError for widths that `into` cannot compare, and for models without vectors of texts.

    >>> from lead_ds.losses import ModelFacts, Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])))
    >>> teacher = Side(VectorFeatures(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 0.0]]])))
    >>> facts = ModelFacts("dual_encoder", layers=3, width=2)
    >>> loss = Embedding(Embedding.set(weight=1), LossShape(facts, facts))
    >>> loss(Views(student, teacher, Scope(group_size=1))).item()  # the query is alike, its passage at a right angle
    0.5
    """

    name, needs = "embedding", frozenset({"features"})
    Settings = in_modes("into", "teacher", INTO)

    @overload
    def __init__(self, settings: EmbeddingSettings, shape: LossShape) -> None: ...
    @overload
    def __init__(self, **values: Any) -> None: ...
    def __init__(self, settings: Any = None, shape: Any = None, **values: Any) -> None:
        super().__init__(settings, shape)
        student, teacher = shape.widths(self.name)
        _check_widths(settings.into, student, teacher)
        # Weights of the loss itself, not of a module in it: ZeRO-3 gathers them for this forward, which may then cast them.
        mapped = isinstance(settings, IntoTeacher) and not settings.keep
        self.map = nn.Parameter(begin_map(student, teacher)) if mapped else None
        layers = settings.count if mapped else 0
        self.layer_maps = nn.Parameter(torch.stack([begin_map(student, teacher)] * layers)) if layers else None
        self.basis: Tensor | None
        basis = torch.eye(teacher, student) if settings.into == "pca" else None
        self.register_buffer("basis", basis, persistent=False)  # stored beside the checkpoints, with its checksum

    @classmethod
    def reads(cls, settings: Any) -> frozenset[Need]:
        return cls.needs | {"layers"} if settings.teacher_layers else cls.needs

    @property
    def sample(self) -> int:
        ridge = self.map is not None and self.settings.start == "ridge"
        return self.settings.sample if ridge or self.basis is not None else 0

    def fit(self, moments: Moments) -> None:
        with torch.no_grad():
            if self.basis is not None:
                self.basis.copy_(moments.directions(self.basis.shape[1]))
            elif self.map is not None:
                self.map.copy_(moments.ridge())
                if self.layer_maps is not None:
                    self.layer_maps.copy_(self.map.expand_as(self.layer_maps))

    def forward(self, views: Views) -> Tensor:
        student = final_vectors(views.student, "student", self.name)
        teacher = final_vectors(views.teacher, "teacher", self.name)
        found = [self._compared(student, teacher, views.scope.group_size, self.map)]
        if self.settings.teacher_layers:
            layers = zip(layer_vectors(views.student), layer_vectors(views.teacher, detach=True), strict=True)
            for place, (s, t) in enumerate(layers):
                own = None if self.layer_maps is None else self.layer_maps[place]
                found.append(self._compared(s, t, views.scope.group_size, own))
        return torch.stack(found).mean()

    def _compared(self, student: Vectors, teacher: Vectors, group_size: int, map_TS: Tensor | None) -> Tensor:
        kinds = zip(self._kinds(student, group_size), self._kinds(teacher, group_size), strict=True)
        distances = [self._distance(s, t, map_TS) for s, t in kinds if len(s)]
        if not distances:
            raise InputError(
                "losses.embedding.of", "names kinds of text that are not there", "add positives: texts alone are such"
            )
        return torch.stack(distances).mean()

    def _kinds(self, vectors: Vectors, group_size: int) -> list[Tensor]:
        p_QND = vectors.passages.unflatten(0, (-1, group_size))
        kinds = {"queries": vectors.queries, "positives": p_QND[:, 0], "negatives": p_QND[:, 1:].flatten(0, 1)}
        return [kinds[kind] for kind in self.settings.of]

    def _distance(self, s_BD: Tensor, t_BD: Tensor, map_TS: Tensor | None) -> Tensor:
        width = s_BD.shape[1]  # fewer than the student's where that is trained at several widths
        if map_TS is not None:
            s_BD = linear(s_BD, map_TS[:, :width].to(s_BD.dtype))
        elif self.basis is not None:
            t_BD = normalize(t_BD @ self.basis[:, :width].to(t_BD.dtype), dim=-1)
        elif width < t_BD.shape[1]:
            t_BD = normalize(t_BD[:, :width], dim=-1)
        return embedding_distance(s_BD, t_BD, self.settings.distance)


def _check_widths(into: str, student: int, teacher: int) -> None:
    where, widths = "losses.embedding.into", f"the student's vectors have {student} dimensions, the teacher's {teacher}"
    if into == "same" and student != teacher:
        remedy = "set it to teacher" + (", truncate or pca" if student < teacher else "")
        raise InputError(where, f"same needs equal widths: {widths}", f"{remedy}, or set student.projection: {teacher}")
    if into in ("truncate", "pca") and student > teacher:
        raise InputError(where, f"{into} needs a teacher as wide as the student: {widths}", "set it to teacher")


def begin_map(student: int, teacher: int) -> Tensor:
    """[D_t, D_s]: the identity, or with orthonormal rows or columns."""
    if student == teacher:
        return torch.eye(student)
    return nn.init.orthogonal_(torch.empty(teacher, student))
