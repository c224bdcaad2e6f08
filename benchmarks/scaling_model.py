"""What a distillation step costs on a cluster, on paper: pure arithmetic. Tables and command: `benchmarks.scaling`.

A step is one accumulation window on every rank: the frozen teacher's forward over the whole window, whose layers are
fetched one ahead of their use, then the student's micro-batches. Weak scaling: the window of a rank stays, nodes are
added. Units: seconds, bytes, FLOP. Every assumption is a field of `Hardware` or `Work`, its source beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLACEMENTS = ("replicate", "zero3", "zero3+hpz", "zero3+cpu", "zero3+nvme")
ELEMENT = 2  # bytes of a parameter, gradient or pooled vector: fp16 or bf16


@dataclass(frozen=True)
class Hardware:
    """One cluster. Where a figure comes from: M measured, P published by others, D datasheet, A assumed."""

    tflops: float = (
        400.0  # A: teacher forward, about half of the 790 TFLOP/s that a bf16 product reaches on an H200 (M)
    )
    student_tflops: float = 120.0  # A: matrices 768 wide feed a tensor core badly, and what lies between them is eager
    nvlink_gbs: float = (
        360.0  # A: NCCL bus bandwidth, 80% of 450 each way (D); 380 point to point (P, NVIDIA/nccl#1264)
    )
    network_gbps: float = 400.0  # D: Gb/s of a whole node, which its GPUs share
    network_efficiency: float = 0.9  # A: of the line rate
    pcie_gbs: float = 50.0  # A: host to one GPU, all GPUs at once, pinned; PCIe 5.0 x16 is 63 (D)
    nvme_gbs: float = 6.0  # A: all disks of a node, read in sequence; one PCIe 4.0 drive is about 7 (D)
    base_us: float = (
        8.4  # P: start of a ring collective, "simple" protocol, in the tables of NCCL's src/graph/tuning.cc
    )
    hop_us: float = 3.4  # P: one NVLink hop of it, ibid.
    network_hop_us: float = 14.0  # P: one network hop of it, ibid.
    gpus: int = 8  # of a node

    @property
    def network(self) -> float:
        """Bytes/s into a node. Each of its GPUs brings in its own share of a layer: 1 / gpus of this each."""
        return self.network_gbps / 8 * 1e9 * self.network_efficiency

    def ring(self, size: float, nodes: int) -> float:
        """Seconds of an all-gather or reduce-scatter with `size` bytes in all, over every GPU of `nodes` nodes.

        NCCL's ring (nccl-tests, doc/PERFORMANCE.md): size (W - 1) / W over the slowest link, and W - 1 hops.
        """
        world = nodes * self.gpus
        if world == 1:
            return 0.0
        slowest = self.nvlink_gbs * 1e9 if nodes == 1 else min(self.nvlink_gbs * 1e9, self.network)
        hops = self.base_us + (world - nodes) * self.hop_us + (nodes - 1) * self.network_hop_us
        return size * (world - 1) / world / slowest + hops * 1e-6

    def fetch(self, size: float, placement: str, nodes: int) -> float:
        """Seconds until a teacher's module of `size` bytes lies whole on every GPU. The stages are not overlapped (A)."""
        if placement == "replicate":
            return 0.0
        if placement == "zero3+hpz":
            return self.ring(size, 1)
        seconds = self.ring(size, nodes)
        if placement in ("zero3+cpu", "zero3+nvme"):
            seconds += size / (nodes * self.gpus) / (self.pcie_gbs * 1e9)
        if placement == "zero3+nvme":
            seconds += size / nodes / (self.nvme_gbs * 1e9)
        return seconds


@dataclass(frozen=True)
class Work:
    """One rank's micro-batch. A dual-encoder teacher reads queries and passages in two passes, as lead-ds runs it."""

    queries: int = 32
    passages: int = 8  # of each query: a positive and 7 negatives
    query_tokens: int = 32
    tokens: int = 128  # of a passage; texts are counted at full length
    layers: int = 5  # compared, beside the final one

    @property
    def passes(self) -> tuple[int, int]:
        """Tokens of the queries, of the passages."""
        return self.queries * self.query_tokens, self.queries * self.passages * self.tokens

    def vectors(self, width: int, world: int) -> int:
        """Bytes of the pooled passage vectors of all ranks, every compared layer."""
        return ELEMENT * (self.layers + 1) * self.queries * self.passages * width * world


@dataclass(frozen=True)
class Model:
    """What costs time in a transformer. Parameters: of a layer, of the embeddings, of all."""

    name: str
    layers: int
    width: int
    layer: int
    embeddings: int
    numel: int


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by part. All but the two `compute`s is exposed communication."""

    teacher_compute: float
    teacher_gathers: float  # what prefetching does not hide
    student_compute: float
    vectors: float  # pooled passage vectors of all ranks, and the student's gradient back
    gradients: float  # ZeRO-1: gradients reduced and parameters gathered once per step, not overlapped (A)

    @property
    def exposed(self) -> float:
        """Seconds in which the GPU waits."""
        return self.teacher_gathers + self.vectors + self.gradients

    @property
    def total(self) -> float:
        """Seconds."""
        return self.teacher_compute + self.student_compute + self.exposed


def pipeline(units: Sequence[tuple[float, float]]) -> float:
    """Seconds of modules that are (fetched, computed) in order, each fetched while the one before is computed."""
    following = [fetch for fetch, _ in units[1:]] + [0.0]
    return units[0][0] + sum(max(compute, fetch) for (_, compute), fetch in zip(units, following, strict=True))


def forward(
    hardware: Hardware, teacher: Model, passes: Sequence[int], placement: str, nodes: int
) -> tuple[float, float]:
    """Seconds of the teacher's forward: (compute, gathers that stay exposed). Attention's own L^2 FLOP are left out: 1%."""
    embeddings = hardware.fetch(ELEMENT * teacher.embeddings, placement, nodes)
    layer = hardware.fetch(ELEMENT * teacher.layer, placement, nodes)
    units: list[tuple[float, float]] = []
    for tokens in passes:
        compute = 2 * teacher.layer * tokens / (hardware.tflops * 1e12)
        units += [(embeddings, 0.0), *[(layer, compute)] * teacher.layers]
    computing = sum(compute for _, compute in units)
    return computing, pipeline(units) - computing


def step(
    hardware: Hardware, work: Work, teacher: Model | None, student: Model, placement: str, nodes: int, accumulation: int
) -> Step:
    """One optimizer step of `accumulation` micro-batches; without a teacher: on cached scores."""
    world = nodes * hardware.gpus
    passes = [tokens * accumulation for tokens in work.passes]
    computing, exposed = forward(hardware, teacher, passes, placement, nodes) if teacher else (0.0, 0.0)
    vectors = 2 * hardware.ring(work.vectors(student.width, world), nodes)  # forward, and its gradient's reduce-scatter
    if teacher:
        vectors += hardware.ring(work.vectors(teacher.width, world), nodes)
    return Step(
        teacher_compute=computing,
        teacher_gathers=exposed,
        student_compute=6 * student.layers * student.layer * sum(passes) / (hardware.student_tflops * 1e12),
        vectors=vectors * accumulation,
        gradients=2 * hardware.ring(ELEMENT * student.numel, nodes),
    )


def break_even(hardware: Hardware, teacher: Model, placement: str, nodes: int) -> float:
    """Tokens per rank and pass from which a layer's computing hides the next one's fetch.

    2 P T / FLOPS >= fetch(2 P bytes): T >= FLOPS / bandwidth x (W - 1) / W, whatever the model's size, plus hops.
    """
    return hardware.fetch(ELEMENT * teacher.layer, placement, nodes) * hardware.tflops * 1e12 / (2 * teacher.layer)
