"""The section `pipeline`: what `lead-ds pipeline` does around the run that the rest of the file describes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lead_ds.settings.base import Fraction, NonNegative, Place, Positive, Section
from lead_ds.settings.mining import MineSettings
from lead_ds.settings.typed import Partial

Changes = Annotated[dict[str, Any], Partial()]
"""Sections of this very file, as far as a stage has them otherwise: {student: {path: ...}, train: {steps: 20000}}."""


class PrepareStage(Section):
    """`lead-ds prepare KIND SRC data.path`, with its options."""

    kind: Literal["msmarco-passage", "msmarco-doc", "trec-dl", "beir", "ir-datasets", "hf"]
    src: Place = Field(description="the published folder, archive or file; an id for ir-datasets and hf")
    corpus: Place | None = None
    task: str | None = None
    subset: str | None = None
    triples: bool = True
    negatives: NonNegative = 0
    drop_missing: bool = False


class Mining(MineSettings):
    """`lead-ds mine`, with its options."""

    split: str = Field("train", description="the judged queries that are mined for: qrels/SPLIT.tsv")
    number: Positive = Field(100, description="negatives of each query")


class FirstNegatives(Mining):
    """The negatives that the first retriever is trained on."""

    source: Literal["bm25", "random", "given"] = Field(
        "bm25", description="random: of the whole corpus, for the judged queries of `split`; given: data.train as it is"
    )


class MineStage(Mining):
    """Hard negatives: what a retriever ranks high that is not a positive."""

    model: Place | None = Field(None, description="a dual encoder; null: the first retriever that was trained")


class LensStage(Section):
    """`lead-ds fit-lens`, with its options; null: their defaults."""

    groups: Positive | None = Field(None, description="training groups to read")
    held_out: Fraction | None = None
    steps: Positive | None = None
    lr: float | None = Field(None, gt=0)
    rank: Positive | None = None
    target: Literal["labels", "final"] | None = None


class TeachStage(Section):
    """`lead-ds teach`."""

    epochs: Positive | None = Field(None, description="whose random negatives are included; null: those of train.steps")
    shard_groups: Positive | None = None
    vectors: str | None = Field(
        None, description="of a dual encoder, keep vectors of these layers instead: 9,10,11 or last:3, all, final, auto"
    )
    shard_texts: Positive | None = None


class EncodeStage(Section):
    """`lead-ds encode`."""

    dtype: Literal["float32", "float16", "int8", "binary", "ubinary"] = Field(
        "float32", description="of the stored vectors; int8 and signs: see `lead-ds encode`"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the model's matrix products")
    dim: Positive | None = Field(None, description="the first so many dimensions of the vectors; null: all")
    batch_size: Positive | None = Field(None, description="null: 16 on a CPU, 64 on a GPU")


class IndexStage(Section):
    """`lead-ds index`, and how `lead-ds search` reads it."""

    factory: str = Field("Flat", description="FAISS's index string: Flat (exact), IVF4096,Flat, HNSW32, PQ64 ...")
    gpus: NonNegative = 0
    layout: Literal["shard", "replicate"] = "shard"
    nprobe: Positive | None = None
    ef_search: Positive | None = None
    rescored: NonNegative | None = Field(
        None, description="times k candidates of an index of signs that are scored again; null: 4; 0: none"
    )


class EvaluateStage(Section):
    """One set of judged queries to search for and to measure on."""

    split: str = "dev"
    data: Place | None = Field(None, description="another dataset's folder; null: data.path")
    name: str | None = Field(None, description="of the other dataset; null: its folder's")
    measures: list[str] = Field(["RR@10", "nDCG@10", "AP@1000", "R@100", "R@1000"], min_length=1)
    relevance_level: Positive = Field(
        1, description="judgements from here on count; TREC DL passages: 2. nDCG is graded"
    )


class PipelineConfig(Section):
    """LEAD's recipe. A stage that is null is left out."""

    launcher: str = Field(
        "auto",
        description="the command that stands for `lead-ds` in stages that use many processes, such as "
        '"deepspeed --num_gpus 8 --module lead_ds" or "launch/local.sh". auto: deepspeed with all GPUs of this machine where '
        "there are several. none: one process",
    )
    prepare: list[PrepareStage] = Field([], description="published files -> data.path, in this order")
    negatives: FirstNegatives = FirstNegatives()
    first: Changes | None = Field({}, description="the first retriever: a warm-up of the student, with these changes")
    mine: MineStage | None = MineStage()
    teacher: Changes | None = Field(None, description="warm-up of the teacher; null: it is used as it comes")
    student: Changes | None = Field({}, description="warm-up of the student, on the mined negatives")
    lens: LensStage | None = Field(None, description="fit a tuned lens to the frozen teacher, and distil through it")
    teach: TeachStage | None = Field(
        None, description="write the frozen teacher's relevance to a cache, and distil from it"
    )
    encode: EncodeStage = EncodeStage()
    index: IndexStage = IndexStage()
    models: list[Literal["first", "teacher", "student", "distilled"]] = Field(
        ["distilled"],
        min_length=1,
        description="which models are searched with; student: as it was before distillation",
    )
    documents: Literal["own", "teacher"] = Field(
        "own",
        description="what encodes the passages that the distilled student searches: itself, or its teacher, in whose space the "
        "student was distilled",
    )
    evaluate: list[EvaluateStage] = Field([EvaluateStage()], description="searched for and measured on")

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        if self.mine is not None and self.mine.model is None and self.first is None:
            raise ValueError("mine needs a retriever: train one (first: {}), or name one in mine.model")
        if "first" in self.models and self.first is None:
            raise ValueError("models names the first retriever, and first is null")
        if len(set(self.models)) < len(self.models):
            raise ValueError("models names one twice")
        return self
