"""Every setting of a run, its default and its bounds. Read once by `load`; plain typed values ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lead_ds.config.losses import AnyLosses, losses_section
from lead_ds.settings.base import BITS, PACE, PLACE, Means, NonNegative, Place, Positive, Section, Seed
from lead_ds.settings.data import DataConfig
from lead_ds.settings.model import TextConfig
from lead_ds.settings.pipeline import PipelineConfig
from lead_ds.settings.plugins import load_plugins
from lead_ds.settings.roles import Trained
from lead_ds.settings.train import (
    DeepSpeedFiles,
    EvaluationConfig,
    Impl,
    MonitorConfig,
    ProfileConfig,
    TrainConfig,
)

# Settings of some kinds of model that another has of its own: given to that one, they would do nothing.
_ELSEWHERE = {
    ("dual_encoder", "token_dim"): "set projection, the width of its vectors",
    ("dual_encoder", "max_length"): "set query_length and passage_length",
    ("colbert", "max_length"): "set query_length and passage_length",
}


class _AnyKind(TextConfig):
    """The settings of all kinds together."""

    pooling: Literal["auto", "cls", "mean", "last"] = Field(
        "auto", description="auto: from modules.json; else cls for encoders, last for decoders"
    )
    normalize: bool | None = Field(None, description="unit-length final vectors; null: from modules.json, else false")
    projection: Positive | None = Field(None, description="width of a new linear layer on top of pooling")
    query_expansion: bool | None = Field(
        None, description="colbert: pad queries to query_length with mask tokens that count; null: as its files say"
    )
    mask_punctuation: bool | None = Field(
        None, description="colbert: punctuation tokens of a passage never match; null: as its files say"
    )
    token_dim: Positive | None = Field(None, description="colbert: width of a new token projection; null: none")

    @model_validator(mode="after")
    def _of_kind(self) -> _AnyKind:
        for (kind, name), instead in _ELSEWHERE.items():
            field = type(self).model_fields.get(name)
            if getattr(self, "kind", None) == kind and field and getattr(self, name) != field.default:
                raise ValueError(f"{name} is nothing that a {kind} reads: {instead}")
        return self


class TeacherConfig(_AnyKind, Trained):
    """The model to learn from. Frozen unless `train`."""

    kind: Literal["dual_encoder", "colbert", "cross_encoder", "llm_reranker", "cached", "scores"] = Field(
        description="scores: those of the training file, with no other key but scale. cached: `path` is a folder that "
        "lead-ds teach wrote. Relevance: teacher losses compare a query with its own passages; vectors (teach --vectors, of a "
        "dual_encoder): with every passage of the batch, as that model would"
    )
    path: Annotated[Place, PLACE] = Field(
        "", description="a model's directory or hub name, or a folder that lead-ds teach wrote"
    )
    placement: Annotated[Literal["auto", "replicate", "zero3"], PACE] = "auto"
    offload: Annotated[Literal["none", "cpu", "nvme"], PACE] = Field("none", description="where zero3 keeps the shards")
    offload_path: Annotated[Place | None, PLACE] = Field(
        None, description="a folder on a local NVMe disk, for offload: nvme"
    )
    max_length: Positive = Field(256, description="tokens of a query-passage pair: cross_encoder, llm_reranker")
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
    instruction: str = Field(
        "Given a web search query, retrieve relevant passages that answer the query",
        description="llm_reranker: the task, told in the prompt",
    )
    template: str = Field(
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}\nRelevant (yes or no):",
        description="llm_reranker: the prompt, with {instruction}, {query} and {passage}",
    )
    yes_token: str = " yes"
    no_token: str = " no"
    lens: Literal["head", "tuned"] = Field(
        "head",
        description="what layers are read through: the model's own head or vector space, or read-outs of their own, which "
        "`lead-ds fit-lens CONFIG` fits; not colbert",
    )
    lens_path: Annotated[Place | None, PLACE] = Field(None, description="the folder of a tuned lens; null: OUTPUT/lens")

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.kind == "scores":
            for name, field in type(self).model_fields.items():
                if name not in ("kind", "scale") and getattr(self, name) != field.default:
                    raise ValueError(f"{name} is nothing that scores have: take it out")
            if self.scale == "cosine":
                raise ValueError("scores have no cosine: set scale to none or standard")
        elif not self.path:
            raise ValueError("path is required: name the model, or the folder that lead-ds teach wrote")
        if self.offload != "none" and self.placement == "replicate":
            raise ValueError("offload needs placement: zero3")
        if self.compile and (self.placement == "zero3" or self.offload != "none"):
            raise ValueError("compile needs placement: replicate")
        if self.offload == "nvme" and not self.offload_path:
            raise ValueError("offload: nvme needs offload_path, a folder on a local disk")
        if self.kind == "cached" and self.train:
            raise ValueError("a cached teacher cannot be trained: name the model itself, or set train: false")
        if self.train and (self.placement == "zero3" or self.offload != "none" or self.compile):
            raise ValueError(
                "a teacher that is trained lives in the student's engine: take placement, offload and compile out of this "
                "section, and choose in deepspeed.student how it is sharded and in train.compile whether both are compiled"
            )
        if self.lens == "tuned" and self.train:
            raise ValueError("a tuned lens is fitted to a frozen teacher: set train: false, or lens: head")
        if self.lens == "tuned" and self.kind == "colbert":
            raise ValueError("a tuned lens reads one state per text, colbert has one per token: set lens: head")
        missing = [name for name in ("{query}", "{passage}") if name not in self.template]
        if missing:
            raise ValueError(f"template lacks {' and '.join(missing)}")
        return self


class StudentConfig(_AnyKind):
    """The model to train."""

    kind: Literal["dual_encoder", "colbert", "cross_encoder"] = "dual_encoder"
    layers: list[NonNegative] | None = Field(
        None, min_length=1, description="keep only these layers of the model at `path`, to start a shallower student"
    )
    max_length: Positive = Field(256, description="tokens of a query-passage pair: cross_encoder")

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a layer twice: the two would share their weights")
        return value


class Config(Section):
    """A whole run: see `ds_configs/recipes/` for complete examples."""

    plugins: list[Place] = Field(
        [],
        description="Python files (x.py) or modules to import first: the losses that they register can be used below",
    )
    seed: Seed = 888
    teacher: TeacherConfig | None = None
    student: StudentConfig
    data: DataConfig
    losses: AnyLosses = Field(default_factory=lambda: losses_section()())
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: DeepSpeedFiles = DeepSpeedFiles()
    monitor: Annotated[MonitorConfig, PACE] = MonitorConfig()
    profile: Annotated[ProfileConfig | None, PACE] = Field(
        None, description="true, or the section: a table and a trace of some steps"
    )
    kernels: Annotated[Impl, BITS] = Field(
        "auto", description="triton, torch (chunked, no CUDA needed), or auto by device"
    )
    output: Annotated[Place, Means("place", shared=True)] = "runs/lead"
    pipeline: Annotated[PipelineConfig | None, PACE] = Field(
        None, description="read by `lead-ds pipeline` alone; null: its defaults"
    )

    @model_validator(mode="before")
    @classmethod
    def _plugins(cls, tree: Any) -> Any:
        names = tree.get("plugins") if isinstance(tree, dict) else None
        if isinstance(names, list):
            load_plugins(name for name in names if isinstance(name, str))
        return tree

    @field_validator("profile", mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    @property
    def lens_folder(self) -> Path:
        """Where the teacher's tuned lens is, or will be."""
        named = None if self.teacher is None else self.teacher.lens_path
        return Path(self.output) / "lens" if named is None else Path(named)

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        if not value or Path(value).resolve() == Path(value).resolve().parent:
            raise ValueError("must name a folder")
        return value

    @model_validator(mode="after")
    def _check(self) -> Config:
        contrastive = self.losses.contrastive
        in_group = self.student.kind == "cross_encoder" or contrastive.scope == "group"
        if in_group and contrastive.weight > 0 and self.data.negatives == 0:
            raise ValueError(
                "data.negatives is 0: the contrastive loss of a cross_encoder, and of scope: group, compares a query's own "
                "passages, and there is but one"
            )
        pairs = {"cross_encoder", "llm_reranker"}
        of_pairs = self.student.kind in pairs or (self.teacher is not None and self.teacher.kind in pairs)
        if of_pairs and self.losses.needs_teacher and self.data.negatives == 0:
            raise ValueError(
                "data.negatives is 0: a model that reads pairs is compared over a query's own passages, and a distribution "
                "over one passage tells nothing: set it to 1 or more"
            )
        for key, model in (("student", self.student), ("teacher", self.teacher)):
            if model is None or model.passes != "packed":
                continue
            if model.kind == "colbert":
                raise ValueError(f"{key}.passes: packed keeps one state of a text, colbert compares all: set a number")
            if self.train.grad_cache is not None and (isinstance(model, StudentConfig) or model.train):
                raise ValueError(f"train.grad_cache makes passes of its own: set {key}.passes to null")
        if self.losses.needs_teacher and self.teacher is None:
            readers = ", ".join(self.losses.needing("final", "layers", "features", "attention"))
            raise ValueError(f"a teacher section is missing: {readers} of losses read one")
        maps = " and ".join(f"losses.{name}.weight: 0" for name in self.losses.needing("attention"))
        if maps:
            for key, value in (
                ("train.grad_cache", self.train.grad_cache),
                ("student.passes", self.student.passes),
                ("teacher.passes", self.teacher.passes if self.teacher else None),
                ("train.overlap", self.train.overlap or None),
            ):
                if value is not None:
                    off = "false" if value is True else "null"
                    raise ValueError(f"{key} has no attention maps: set it to {off}, or {maps}")
        if self.teacher is not None and self.teacher.train and self.losses.informative is not None:
            raise ValueError(
                "select: informative measures a frozen teacher once: set teacher.train: false, or another select"
            )
        if self.teacher is not None and self.teacher.kind == "cached" and maps:
            raise ValueError(f"a cached teacher has no attention maps: set {maps}, or name the model itself")
        return self
