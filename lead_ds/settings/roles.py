"""What a model is set by as the teacher or the student of a run, beside what its kind is set by."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from lead_ds.settings.base import BITS, PACE, PLACE, NonNegative, Place, Positive, Section
from lead_ds.settings.model import ModelConfig


class Trained(Section):
    """Of a teacher that learns along: these decide a run, but not what the model gives for a text."""

    train: bool = Field(
        False, description="co-train the teacher, as LEAD's paper does: in the student's engine and dtype"
    )
    lr: float | None = Field(None, gt=0, description="learning rate of a co-trained teacher; null: train.lr")


class TeacherRole(ModelConfig, Trained):
    """Of a model to learn from. Frozen unless `train`."""

    placement: Annotated[Literal["auto", "replicate", "zero3"], PACE] = "auto"
    offload: Annotated[Literal["none", "cpu", "nvme"], PACE] = Field("none", description="where zero3 keeps the shards")
    offload_path: Annotated[Place | None, PLACE] = Field(
        None, description="a folder on a local NVMe disk, for offload: nvme"
    )
    batch_size: Annotated[Positive | None, BITS] = Field(
        None, description="texts or pairs per teacher forward; null: the whole accumulation window at once"
    )
    compile: Annotated[bool, BITS] = Field(
        False,
        description="torch.compile the teacher; placement: replicate only, for ZeRO-3's gathers cannot be compiled",
    )
    truncate: Annotated[bool, PACE] = Field(
        True,
        description="do not load layers above the highest one that the losses read (select: given, no final relevance)",
    )
    lens: Literal["head", "tuned"] = Field(
        "head",
        description="what layers are read through: the model's own head or vector space, or read-outs of their own, which "
        "`lead-ds fit-lens CONFIG` fits; not colbert",
    )
    lens_path: Annotated[Place | None, PLACE] = Field(None, description="the folder of a tuned lens; null: OUTPUT/lens")

    @model_validator(mode="after")
    def _check(self) -> TeacherRole:
        if self.offload != "none" and self.placement == "replicate":
            raise ValueError("offload needs placement: zero3")
        if self.compile and (self.placement == "zero3" or self.offload != "none"):
            raise ValueError("compile needs placement: replicate")
        if self.offload == "nvme" and not self.offload_path:
            raise ValueError("offload: nvme needs offload_path, a folder on a local disk")
        if self.offload_path and self.offload != "nvme":
            raise ValueError(f"offload_path is ignored by offload: {self.offload}: take it out, or set offload: nvme")
        if self.train and (self.placement == "zero3" or self.offload != "none" or self.compile):
            raise ValueError(
                "a teacher that is trained lives in the student's engine: take placement, offload and compile out of this "
                "section. deepspeed.student says how it is sharded, train.compile whether both are compiled"
            )
        if self.train and self.batch_size is not None:
            raise ValueError("a teacher that is trained reads the student's micro-batches: take batch_size out")
        if self.lens == "tuned" and self.train:
            raise ValueError("a tuned lens is fitted to a frozen teacher: set train: false, or lens: head")
        return self


class Span(NamedTuple):
    """The steps at which something happens, from 0: `after` and all that follow, but for `until` and later."""

    after: int = 0
    until: int | None = None

    def holds(self, step: int) -> bool:
        """Whether it happens at a step."""
        return self.after <= step and (self.until is None or step < self.until)


class Share(Section):
    """Of one teacher among several: how much it counts, for which losses, and at which steps."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="how much it counts beside the others")
    losses: list[str] | None = Field(
        None, min_length=1, description="names of the losses that it feeds; null: all that it can give something to"
    )
    after: NonNegative = Field(0, description="steps that pass before it teaches")
    until: Positive | None = Field(None, description="the last step at which it teaches; null: to the end")

    @model_validator(mode="after")
    def _teaches(self) -> Share:
        if self.until is not None and self.until <= self.after:
            raise ValueError(f"until: {self.until} is not behind after: {self.after}: it would teach at no step")
        return self


class MixConfig(Section):
    """How several teachers that feed the same loss are put together; otherwise each is compared by itself.

    The loss is then the mean of what it gives for each, by their weights. Of a KL, a squared error of margins or a
    squared distance that has the gradient of the mean of their relevance, or vectors.
    """

    relevance: Literal["weight", "nll"] = Field(
        "weight",
        description="of losses of final relevance. nll: one mixture of the teachers' distributions, in which each counts by "
        "its weight and by the likelihood that it gives to the query's positive",
    )
    vectors: Literal["fold", "concatenate"] = Field(
        "fold",
        description="of losses of vectors. fold: each teacher's own, through a linear map each where the loss has one; "
        "concatenate: one vector, in which cosines are the weighted mean of the teachers' cosines",
    )


class CachedRole(TeacherRole):
    """What `teach` kept of a model, in the folder `path`. The settings of that model may stand beside it: what decided what was
    kept must be what it was.

    Relevance: teacher losses compare a query with its own passages; vectors (teach --vectors, of a dual encoder): with every
    passage of the batch, as that model would.
    """

    @model_validator(mode="after")
    def _not_trained(self) -> CachedRole:
        if self.train:
            raise ValueError("a cached teacher cannot be trained: name the model itself, or set train: false")
        return self


Quantize = Literal["int8", "binary"]


class WidthConfig(Section):
    """How wide the student becomes before the first step: what does the least on a sample of the run's first texts is cut.

    Of BERT, RoBERTa, XLM-RoBERTa and CamemBERT. Such a model is as wide as its heads together: heads follow from hidden,
    or hidden from heads.
    """

    hidden: Positive | None = Field(None, description="hidden dimensions to keep, the same in all layers; null: all")
    heads: Positive | None = Field(None, description="attention heads to keep in each layer; null: as hidden says")
    feed_forward: Positive | None = Field(None, description="feed-forward neurons to keep in each layer; null: all")
    sample: Positive = Field(1024, description="texts on which it is measured what each part does, at least")

    @model_validator(mode="after")
    def _cuts(self) -> WidthConfig:
        if self.hidden is None and self.heads is None and self.feed_forward is None:
            raise ValueError("cuts nothing: give hidden, heads or feed_forward")
        return self


class StudentRole(ModelConfig):
    """Of the model to train."""

    layers: list[NonNegative] | None = Field(
        None, min_length=1, description="keep only these layers of the model at `path`, to start a shallower student"
    )

    width: WidthConfig | None = Field(
        None, description="cut the model in width, too, by the activations of its parts; null: not at all"
    )

    dims: list[Positive] | None = Field(
        None,
        min_length=1,
        description="widths that its vectors are trained at, such as [64, 128, 256, 384]: every loss that reads them is its "
        "mean over these, their first dimensions alone (Matryoshka). The largest is the width of its vectors",
    )

    quantize: Quantize | None = Field(
        None,
        description="train it to be quantised: every loss that reads its vectors is the mean of itself and of itself on vectors "
        "as int8, or signs alone, would hold them (straight-through)",
    )

    passages: Literal["own", "teacher"] = Field(
        "own",
        description="teacher: it reads queries alone, and every loss compares them with the teacher's vectors of the passages: "
        "for searching the teacher's index (evaluate --query-model STUDENT --document-model TEACHER)",
    )

    @field_validator("dims")
    @classmethod
    def _dims(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and sorted(set(value)) != value:
            raise ValueError("are not in ascending order, each once")
        return value

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a layer twice: the two would share their weights")
        return value
