"""Which candidates of a first retriever become hard negatives: of `lead_ds.retrieval.mine`, and of the pipeline's stages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lead_ds.settings.base import NonNegative, Positive, Section


class MineSettings(Section):
    """Which candidates become negatives: the options of `lead-ds mine`."""

    number: Positive = Field(30, description="negatives of each query")
    skip: NonNegative = Field(
        0,
        description="the first so many ranks (positives not counted) are left out: unjudged positives are likeliest there",
    )
    depth: Positive | None = Field(
        None, description="candidates read of each query; null: 200, or skip + number if more"
    )
    margin: float | None = Field(
        None,
        allow_inf_nan=False,
        description="candidates that score more than the query's least positive - margin are left out",
    )
    ratio: float | None = Field(
        None,
        allow_inf_nan=False,
        description="candidates that score more than ratio * the least positive are left out, as in NV-Retriever, "
        "arXiv 2407.15831",
    )
    similar: float = Field(
        0.9,
        gt=0,
        le=1,
        description="candidates that share at least this part of their words with a positive (Jaccard) are left out as "
        "copies; 1: those of the same words only",
    )
    keep_identical: bool = Field(
        False, description="keep a passage that is the query itself, by its id or its text, as a candidate"
    )
    relabel: bool = Field(
        False,
        description="candidates that score above margin or ratio allow become positives (RLHN, arXiv 2505.16967), instead of "
        "being left out: for scores of a teacher that you trust more than the judgements",
    )
    sample: Literal["top", "random", "stratified"] = Field(
        "top",
        description="the hardest ones that are left; random ones; or ones spread evenly over the range of their scores "
        "(arXiv 2604.04734)",
    )
    seed: NonNegative = 0

    @field_validator("depth")
    @classmethod
    def _check_depth(cls, depth: int | None, info: ValidationInfo) -> int | None:
        if depth is not None and depth < info.data.get("number", 0) + info.data.get("skip", 0):
            raise ValueError("is less than skip + number: read more candidates per query")
        return depth

    @model_validator(mode="after")
    def _check_together(self) -> MineSettings:
        if self.relabel and self.margin is None and self.ratio is None:
            raise ValueError("relabel has no bound: set margin or ratio")
        if self.seed and self.sample != "random":
            raise ValueError(f"seed is ignored by sample: {self.sample}, which draws nothing: take it out")
        return self
