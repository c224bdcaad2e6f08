"""Settings of a run: its loop, its evaluation, its monitors and profile, its DeepSpeed files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lead_ds.settings.base import BITS, PACE, PLACE, Fraction, NonNegative, Place, Positive, Section

Impl = Literal["auto", "triton", "torch"]


class LoraConfig(Section):
    """Low-rank updates of linear layers in place of their weights: LoRA, arXiv:2106.09685. Needs the extra `adapters`."""

    r: Positive = Field(16, description="rank of an update")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="an update counts alpha / r times")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="names of linear layers, such as q_proj; null: every one of the transformer's layers",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of what an update reads")


class TrainConfig(Section):
    """The training loop. Batch sizes count queries, per rank."""

    steps: Positive = 50_000
    batch_size: Positive = 16
    accumulation: Positive = 1
    lr: float = Field(5.0e-5, gt=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    clip: float = Field(2.0, ge=0, description="gradient norm; 0: no clipping")
    in_batch: Literal["global", "local"] = Field(
        "global",
        description="other queries' passages as negatives: of every rank, or of the rank's micro-batch",
    )
    lora: LoraConfig | None = Field(
        None,
        description="train low-rank updates of the student's transformer, or of the teacher's in its warm-up, and what stands "
        "behind it: a scoring head, Dense layers. Merged when it is saved. null: train every weight",
    )
    gradient_checkpointing: Annotated[bool, BITS] = False
    grad_cache: Annotated[Positive | None, BITS] = Field(
        None,
        description="GradCache: as many in-batch passages as you like in the memory of this many queries' and their passages'. "
        "Same loss and gradient, for one more forward of the student. null: off, every activation is kept",
    )
    compile: Annotated[bool, BITS] = Field(False, description="torch.compile the student")
    overlap: Annotated[bool, PACE] = Field(
        False,
        description="the teacher of the next window runs beside the student of this one, on a CUDA stream of its own; needs "
        "teacher.placement: replicate, and a second window in memory. Same losses. On a CPU there is nothing to gain",
    )
    deterministic: Annotated[bool, BITS] = Field(
        False,
        description="on a GPU: to give the same bits in every run on as many of the same GPUs, with the same versions (not tried "
        "on one yet). Slower: attention takes kernels that add in a fixed order, and an operation that has none ends the run. "
        "A CPU's bits are the same anyway",
    )
    log_every: Annotated[Positive, PACE] = 10
    save_every: Annotated[Positive, PACE] = 1000
    evaluate_every: NonNegative = Field(1000, description="0: only at the end")
    keep: Annotated[Positive, PACE] = Field(3, description="checkpoints kept; the best one is also kept")
    average: Annotated[int, Field(gt=1)] | None = Field(
        None,
        description="export the mean of the last so many checkpoints (train.save_every apart); null: the best one, or the last",
    )
    average_by: Literal["last", "dev"] = Field(
        "last", description="weights of the average: equal ones, or searched on evaluation.split by evaluation.metric"
    )
    patience: NonNegative = Field(0, description="evaluations without a better metric before stopping; 0: never stop")
    watchdog_minutes: Annotated[float, PACE] = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="a run that stands still so long is ended, naming the rank to blame; 0: never",
    )


class EvaluationConfig(Section):
    """During training: of a dual encoder by exact search over the corpus, of others by reranking candidates."""

    split: str | None = Field("dev", description="qrels/SPLIT.tsv; null, or where dev is absent: no evaluation")
    path: Annotated[Place | None, PLACE] = Field(
        None, description="a folder with corpus, queries and qrels; null: data.path"
    )
    metric: str = Field("nDCG@10", description="decides which checkpoint is best; ir-measures' names")
    measures: list[str] = Field(["RR@10", "nDCG@10", "AP@1000", "R@100", "R@1000"])
    queries: NonNegative = Field(0, description="at most so many queries, drawn by the seed; 0: all")
    batch_size: Annotated[Positive, BITS] = 64
    run: Annotated[Place | None, PLACE] = Field(
        None, description="colbert, cross_encoder: a TREC run whose passages are reranked; null: BM25's, found at start"
    )
    depth: Positive = Field(100, description="colbert, cross_encoder: passages of each query that are reranked")


class MonitorConfig(Section):
    """Where the curves go: DeepSpeed's monitor."""

    tensorboard: bool = True
    csv: bool = True
    wandb: bool = False
    project: str = "lead-ds"


class ProfileConfig(Section):
    """Where the steps' time goes, written to OUTPUT/profile/. `profile: true` takes the defaults."""

    skip: NonNegative = Field(3, description="steps that pass first: their time is warming up")
    steps: Positive = Field(5, description="steps that are timed by part; as many after them are traced")
    operators: Positive = Field(15, description="how many of the costliest operators the table lists")


class DeepSpeedFiles(Section):
    """DeepSpeed configurations: a path (also by its name in ds_configs/), or the dictionary itself."""

    student: Annotated[str | dict[str, Any], PLACE] = "ds_configs/student_zero1.json"
    teacher: Annotated[str | dict[str, Any], PLACE] = "ds_configs/teacher_zero3.json"
