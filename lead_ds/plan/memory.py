"""Bytes of parameters, gradients and optimizer state that one rank holds: DeepSpeed's own arithmetic, to the byte.

W ranks; e bytes of a parameter (4 fp32, 2 bf16 and fp16). Adam keeps two fp32 moments; a half-precision model also an fp32
master copy (ZeRO 1-3 keep that copy of an fp32 model, too). ZeRO, arXiv:1910.02054, section 3; the padding is that of
deepspeed/runtime/zero/stage_1_and_2.py (groups flattened, padded to a multiple of 2 W) and stage3.py (each parameter to W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lead_ds.plan.shapes import ModelShape, Parameter


@dataclass(frozen=True)
class StudentMemory:
    """Bytes of what is trained, on each GPU; `host`: those that are offloaded to each rank's share of the machine's memory."""

    parameters: int
    gradients: int
    master: int
    moments: int
    gathered: int  # ZeRO-3: parameters gathered for the computation, and those that always are
    buffers: int  # communication
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.parameters + self.gradients + self.master + self.moments + self.gathered + self.buffers


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes of a frozen teacher: on each GPU; `host` and `disk`: on each machine."""

    shard: int
    gathered: int
    host: int = 0
    disk: int = 0


def student_memory(shapes: Sequence[ModelShape], zero: dict[str, Any], element: int, world: int) -> StudentMemory:
    """States of the models in one engine (the student; a co-trained teacher beside it).

    zero: the "zero_optimization" section of a DeepSpeed configuration; element: bytes of a parameter; world: ranks.
    """
    parameters = [p for shape in shapes for p in shape.parameters]
    trained = sum(p.numel for p in parameters if p.trainable)
    frozen = sum(p.numel for p in parameters if not p.trainable)
    stage = int(zero.get("stage", 0))
    if stage == 0:
        return StudentMemory(
            parameters=element * (trained + frozen),
            gradients=element * trained,
            master=0 if element == 4 else 4 * trained,
            moments=8 * trained,
            gathered=0,
            buffers=element * trained if world > 1 else 0,  # gradients are reduced in flat copies
        )
    bucket = int(zero.get("reduce_bucket_size", 500_000_000)) * element
    if stage < 3:
        groups = [sum(p.numel for p in group) for group in _groups(shapes)]
        partition = sum(-(-numel // (2 * world)) * 2 for numel in groups)
        double = 2 if zero.get("overlap_comm") else 1
        held = StudentMemory(
            parameters=element * (partition * world + frozen),
            gradients=element * (trained if stage == 1 else partition),
            master=4 * partition,
            moments=8 * partition,
            gathered=0,
            buffers=bucket * double,
        )
    else:
        partition = sum(-(-p.numel // world) for p in parameters if p.trainable)
        share = sum(-(-p.numel // world) for p in parameters)
        held = StudentMemory(
            parameters=element * share,
            gradients=element * partition,
            master=4 * partition,
            moments=8 * partition,
            gathered=element * max(gathered_elements(shape, zero) for shape in shapes),
            buffers=bucket,
        )
    return _offloaded(held, zero)


def teacher_memory(
    shape: ModelShape, placement: str, zero: dict[str, Any], element: int, world: int, per_node: int
) -> TeacherMemory:
    """States of a frozen teacher: placement "replicate", "zero3", "zero3+cpu" or "zero3+nvme"."""
    if placement == "replicate":
        return TeacherMemory(shard=element * shape.numel, gathered=0)
    share = element * sum(-(-p.numel // world) for p in shape.parameters)
    gathered = element * gathered_elements(shape, zero)
    if placement == "zero3":
        hpz = int(_number(zero, "zero_hpz_partition_size", per_node)) if "zero_hpz_partition_size" in zero else 1
        second = element * sum(-(-p.numel // hpz) for p in shape.parameters) if hpz > 1 else 0
        return TeacherMemory(shard=share + second, gathered=gathered)
    if placement == "zero3+cpu":
        return TeacherMemory(shard=0, gathered=gathered, host=share * per_node)
    offload = zero.get("offload_param", {})
    largest = max(-(-p.numel // world) for p in shape.parameters)
    buffers = int(offload.get("buffer_count", 5)) * int(_number(offload, "buffer_size", largest)) * element
    return TeacherMemory(shard=0, gathered=gathered, host=buffers * per_node, disk=share * per_node)


def gathered_elements(shape: ModelShape, zero: dict[str, Any]) -> int:
    """Elements that ZeRO-3 gathers beside its shard, at most: those that are prefetched, those in use, what is never let go.

    Each module begins another prefetch of `stage3_prefetch_bucket_size`, while fewer than `stage3_max_live_parameters` are
    gathered; what was prefetched twice (queries, then passages) is kept until its second use. Those in use come on top.
    "auto" values are those of `engine.distributed.deepspeed_files`: a bucket of 12 width^2, two layers, and tensors up to
    10 width resident.
    """
    prefetch = int(_number(zero, "stage3_prefetch_bucket_size", 12 * shape.width**2, default=50_000_000))
    threshold = int(_number(zero, "stage3_param_persistence_threshold", 10 * shape.width, default=100_000))
    live = int(_number(zero, "stage3_max_live_parameters", 2 * shape.largest_layer, default=10**9))
    reuse = int(zero.get("stage3_max_reuse_distance", 10**9))
    resident = sum(p.numel for p in shape.parameters if p.numel <= threshold)
    ahead = max(live if prefetch else 0, reuse)
    return min(shape.numel, ahead + shape.largest_gather + resident)


def _groups(shapes: Sequence[ModelShape]) -> list[list[Parameter]]:
    """The optimizer's groups: matrices (decayed) and the rest, of each model."""
    groups = []
    for shape in shapes:
        trained = [p for p in shape.parameters if p.trainable]
        groups += [[p for p in trained if p.matrix], [p for p in trained if not p.matrix]]
    return [group for group in groups if group]


def _offloaded(held: StudentMemory, zero: dict[str, Any]) -> StudentMemory:
    """Optimizer state, and at stage 3 parameters, moved off the GPU where the configuration has it so."""
    from dataclasses import replace

    host = 0
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        host += held.master + held.moments + held.gradients
        held = replace(held, master=0, moments=0, gradients=0)
    if zero.get("offload_param", {}).get("device", "none") != "none":
        host += held.parameters
        held = replace(held, parameters=0)
    return replace(held, host=host)


def _number(section: dict[str, Any], key: str, auto: float, default: float | None = None) -> float:
    value = section.get(key, auto if default is None else default)
    return auto if value == "auto" else value
