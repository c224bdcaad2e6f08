"""Settings of the losses: what is aligned, how strongly, at which temperature."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lead_ds.settings.base import NonNegative, Positive, Section, Temperature, Weight

Selection = Literal["random", "last", "skip", "given", "informative"]


def check_given(select: Selection, teacher: list[int] | None, student: list[int] | None) -> None:
    """Raise ValueError where layers are given without select: given, or the reverse, or cannot be paired."""
    given = teacher is not None and student is not None
    if (select == "given") != given or (teacher is None) != (student is None):
        raise ValueError("teacher_layers and student_layers go with select: given, both of them")
    if len(teacher or []) != len(student or []):
        raise ValueError("teacher_layers and student_layers are paired in order and must be equally many")


class ContrastiveLoss(Section):
    """L_stu: negative log-likelihood of the positive."""

    weight: Weight = 1.0
    temperature: Temperature = 1.0
    teacher_temperature: Temperature | None = Field(
        None, description="of a teacher that is trained, along or by `warmup --of teacher`; null: temperature"
    )
    scope: Literal["auto", "batch", "group"] = Field(
        "auto", description="over every passage of the batch, or the query's own; auto: batch"
    )


class ResponseLoss(Section):
    """L_rep: KL(teacher || student) of the final relevance."""

    weight: Weight = 1.0
    teacher_temperature: Temperature = 1.0
    student_temperature: Temperature = 1.0


class MarginMSELoss(Section):
    """Squared error between the teacher's and the student's margins of positive over negatives."""

    weight: Weight = 0.0
    teacher_scale: float = Field(1.0, gt=0, description="multiplies the teacher's scores first")


class LayerLoss(Section):
    """L_lyr: LEAD's layer relevance KL."""

    weight: Weight = 1.0
    select: Selection = Field(
        "random",
        description="random; last; skip: evenly spaced; given; informative: random, of the teacher's layers whose own NLL of "
        "the positive is below chance (as its tuned lens was measured, else measured at start). Of a teacher whose vectors "
        "were cached, random and informative draw among the layers that are stored; others must be stored",
    )
    informative_margin: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="select: informative; nats by which the NLL is below chance, log N"
    )
    k: Positive = 5
    every: Positive = Field(10, description="steps between two draws of select: random or informative")
    teacher_layers: list[NonNegative] | None = Field(None, min_length=1, description="select: given")
    student_layers: list[NonNegative] | None = Field(None, min_length=1, description="select: given")
    teacher_temperature: Temperature = 1.0
    student_temperature: Temperature = 1.0
    layer_temperature: Temperature = 10.0
    reweight: bool = True

    @model_validator(mode="after")
    def _check(self) -> LayerLoss:
        check_given(self.select, self.teacher_layers, self.student_layers)
        return self


class AttentionLoss(Section):
    """Attention-distribution KL (or MSE) between selected layers."""

    weight: Weight = 0.0
    form: Literal["self", "interaction"] = Field(
        "self", description="self: attention maps of each text; interaction: query tokens over passage tokens"
    )
    divergence: Literal["kl", "mse"] = Field("kl", description="mse: interaction form only")
    select: Literal["random", "last", "skip", "given"] = "last"
    k: Positive = 1
    every: Positive = 10
    teacher_layers: list[NonNegative] | None = Field(None, min_length=1, description="select: given")
    student_layers: list[NonNegative] | None = Field(None, min_length=1, description="select: given")
    heads: Literal["relation", "mean", "pair"] = Field(
        "relation", description="relation: MiniLMv2 relation heads; mean: averaged maps; pair: one to one"
    )
    relation_heads: Positive | None = Field(None, description="heads: relation; null: the student's number of heads")
    temperature: Temperature = 1.0

    @model_validator(mode="after")
    def _check(self) -> AttentionLoss:
        if self.divergence == "mse" and self.form != "interaction":
            raise ValueError("divergence: mse goes with form: interaction")
        if self.form == "interaction" and self.heads == "mean":
            raise ValueError("heads: mean does not go with form: interaction: use heads: relation")
        if self.relation_heads is not None and self.heads != "relation":
            raise ValueError("relation_heads goes with heads: relation")
        check_given(self.select, self.teacher_layers, self.student_layers)
        return self


class LossesConfig(Section):
    """The objective: a weighted sum; weight 0 switches a loss off."""

    contrastive: ContrastiveLoss = ContrastiveLoss()
    response: ResponseLoss = ResponseLoss()
    margin_mse: MarginMSELoss = MarginMSELoss()
    layer: LayerLoss = LayerLoss()
    attention: AttentionLoss = AttentionLoss()

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss with a weight reads the teacher."""
        return any(part.weight > 0 for part in (self.response, self.margin_mse, self.layer, self.attention))
