"""Every placement's memory by part, and the first one that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lead_ds.config import Config, StudentConfig, TeacherConfig
from lead_ds.models.kinds.kind import KINDS
from lead_ds.plan.memory import student_memory, teacher_memory
from lead_ds.plan.shapes import ModelShape

PLACEMENTS = ("replicate", "zero3", "zero3+cpu", "zero3+nvme")
GIB = 1 << 30
CONTEXT = GIB  # CUDA's context, cuBLAS's workspaces and NCCL's channels
SLACK = 0.05  # of the rest: what the caching allocator cannot hand out again


@dataclass(frozen=True)
class Cluster:
    """What the run may use. `gpu_memory`, `host_memory`: bytes of a GPU, of a machine (None: not checked)."""

    gpus: int
    nodes: int
    gpu_memory: int
    host_memory: int | None = None

    @property
    def world(self) -> int:
        """Ranks."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher that runs a model: its key and section in the configuration, its shape, bytes of a parameter, and the
    activations of so many queries per forward."""

    key: str
    settings: TeacherConfig
    shape: ModelShape
    element: int
    activations: Callable[[int], int]


@dataclass(frozen=True)
class Requirements:
    """What a run holds, as far as it does not depend on the placement. Elements: bytes of a parameter.

    The activations are functions, since counting takes a moment: the student's of checkpointing and of the longest
    text's length (None: as configured). `lengths`: those worth showing.
    """

    config: Config
    student: ModelShape
    teachers: list[PlannedTeacher]
    student_element: int
    group_size: int  # passages of a query
    student_activations: Callable[[bool, int | None], int]
    lengths: tuple[int, ...]
    student_zero: dict[
        int, dict[str, Any]
    ]  # stage -> "zero_optimization" section; the configured stage is the first key
    teacher_zero: dict[str, dict[str, Any]]  # placement -> section

    @property
    def cotrained(self) -> bool:
        """Whether the teacher is trained beside the student, in the same engine."""
        return self.config.cotrained is not None


@dataclass(frozen=True)
class Choice:
    """What a plan may turn: teacher placement, the student's ZeRO stage, checkpointing, queries per teacher forward."""

    placement: str
    stage: int
    checkpointing: bool
    chunk: int  # queries per teacher forward


@dataclass(frozen=True)
class Estimate:
    """Bytes per GPU by use, per machine (host, disk), and whether that fits."""

    choice: Choice
    uses: dict[str, int]
    host: int
    disk: int
    fits: bool

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return sum(self.uses.values())


@dataclass(frozen=True)
class Plan:
    """All placements as configured, and the recommended choice (None: nothing fits)."""

    requirements: Requirements
    cluster: Cluster
    placements: list[Estimate]
    recommended: Estimate | None
    changes: list[str] = field(default_factory=list)  # overrides that make a run of the configuration follow it


def make_plan(requirements: Requirements, cluster: Cluster) -> Plan:
    """Estimate every placement, and recommend the fastest that fits, with as few changes to the configuration as need be.

    Faster first: a replicated teacher gathers nothing, ZeRO-3 gathers over the network, offloading also over PCIe.
    """
    calculator = _Calculator(requirements, cluster)
    config = requirements.config
    stage = next(iter(requirements.student_zero))
    chunk = config.train.batch_size * config.train.accumulation
    for teacher in requirements.teachers:
        if teacher.settings.batch_size is not None:
            chunk = max(1, min(chunk, teacher.settings.batch_size // requirements.group_size))
    placements = PLACEMENTS if requirements.teachers and not requirements.cotrained else ("none",)
    checkpointing = config.train.gradient_checkpointing
    listed = [calculator.estimate(Choice(p, stage, checkpointing, chunk)) for p in placements]

    candidates = (
        Choice(placement, try_stage, try_checkpointing, try_chunk)
        for offloaded in (False, True)
        for try_stage in dict.fromkeys([stage, *(s for s in sorted(requirements.student_zero) if s > stage)])
        for try_checkpointing in dict.fromkeys([checkpointing, True])
        for try_chunk in dict.fromkeys([chunk, max(1, chunk // 4), max(1, chunk // 16), 1])
        for placement in placements
        if ("+" in placement) == offloaded
    )
    found = next((e for e in map(calculator.estimate, candidates) if e.fits), None)
    changes = _changes(requirements, found.choice, stage, chunk) if found else []
    return Plan(requirements, cluster, listed, found, changes)


class _Calculator:
    def __init__(self, requirements: Requirements, cluster: Cluster) -> None:
        self.r, self.cluster = requirements, cluster

    def estimate(self, choice: Choice) -> Estimate:
        r, cluster = self.r, self.cluster
        trained = [r.student, *(teacher.shape for teacher in r.teachers if r.cotrained)]
        student = student_memory(trained, r.student_zero[choice.stage], r.student_element, cluster.world)
        activations = r.student_activations(choice.checkpointing, None)
        uses = {
            "student parameters": student.parameters,
            "student gradients": student.gradients,
            "student optimizer": student.master + student.moments,
            "student gathered": student.gathered,
            "student activations": activations,
        }
        host, disk = student.host * cluster.gpus, 0
        if r.teachers and not r.cotrained:
            zero, placed = r.teacher_zero.get(choice.placement, {}), choice.placement
            held = [
                teacher_memory(teacher.shape, placed, zero, teacher.element, cluster.world, cluster.gpus)
                for teacher in r.teachers
            ]
            uses["teacher shard"] = sum(teacher.shard for teacher in held)
            # They run one after the other.
            uses["teacher gathered layers"] = max(teacher.gathered for teacher in held)
            # The teachers' forwards are over before the student's activations exist: only the excess counts.
            largest = max(teacher.activations(choice.chunk) for teacher in r.teachers)
            uses["teacher activations, more"] = max(0, largest - activations)
            host, disk = host + sum(one.host for one in held), sum(one.disk for one in held)
        uses["captured features"] = self.features
        uses["communication buffers"] = student.buffers + self.gathered_features
        uses["context and slack"] = CONTEXT + int(SLACK * sum(uses.values()))
        room = cluster.host_memory
        fits = sum(uses.values()) <= cluster.gpu_memory and (room is None or host <= room)
        return Estimate(choice, uses, host, disk, fits)

    @cached_property
    def captured(self) -> int:
        """Layers that are compared, and the final one."""
        if not self.r.teachers:
            return 1
        deepest = max(teacher.shape.layers for teacher in self.r.teachers)
        return 1 + min(self.r.config.losses.captured, self.r.student.layers, deepest)

    def vectors(self, shape: ModelShape, config: StudentConfig | TeacherConfig) -> tuple[int, int]:
        """Elements that one query and one passage leave behind, per captured layer."""
        return KINDS[config.kind].features_of(config, shape.features)

    @cached_property
    def features(self) -> int:
        """Captured features of the teacher's window and the student's micro-batch, and the relevance maps, in float32."""
        r, train = self.r, self.r.config.train
        models: list[tuple[ModelShape, StudentConfig | TeacherConfig, int]] = [
            (r.student, r.config.student, train.batch_size)
        ]
        window = train.batch_size * train.accumulation
        models += [(teacher.shape, teacher.settings, window) for teacher in r.teachers]
        total = 0
        for shape, config, queries in models:
            query, passage = self.vectors(shape, config)
            total += 4 * self.captured * queries * (query + r.group_size * passage)
        scope = self.cluster.world if train.in_batch == "global" else 1
        maps = len(models) * self.captured * train.batch_size * train.batch_size * scope * r.group_size
        return total + 2 * 4 * maps  # logits and their gradient

    @cached_property
    def gathered_features(self) -> int:
        """Passages of every rank, for in-batch negatives."""
        r, train = self.r, self.r.config.train
        if train.in_batch != "global" or self.cluster.world == 1:
            return 0
        models: list[tuple[ModelShape, StudentConfig | TeacherConfig]] = [(r.student, r.config.student)]
        models += [(teacher.shape, teacher.settings) for teacher in r.teachers]
        each = sum(self.vectors(shape, config)[1] for shape, config in models)
        return 4 * self.captured * self.cluster.world * train.batch_size * r.group_size * each


def _changes(r: Requirements, choice: Choice, stage: int, chunk: int) -> list[str]:
    changes = []
    for teacher in r.teachers if choice.placement != "none" else ():
        placement, _, offload = choice.placement.partition("+")
        changes.append(f"{teacher.key}.placement={placement}")
        if offload:
            changes.append(f"{teacher.key}.offload={offload}")
        if choice.chunk != chunk:
            changes.append(f"{teacher.key}.batch_size={choice.chunk * r.group_size}")
    if choice.checkpointing and not r.config.train.gradient_checkpointing:
        changes.append("train.gradient_checkpointing=true")
    if choice.stage != stage:
        changes.append(f"deepspeed.student=ds_configs/student_zero{choice.stage}.json")
    return changes
