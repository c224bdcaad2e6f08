"""What the models of a configuration hold, read from their config.json alone: no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config, zero_stage
from lead_ds.models.backbone import find_layers, read_model_config
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.load import settled_model
from lead_ds.models.lora import add_lora
from lead_ds.models.narrow import first_ones, narrow, sizes_after
from lead_ds.plan.activations import forward_bytes
from lead_ds.plan.placement import PlannedTeacher, Requirements
from lead_ds.plan.shapes import ModelShape
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.train import DeepSpeedFiles, LoraConfig
from lead_ds.teachers.frozen import depth_needed
from lead_ds.teachers.open import teacher_class

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def requirements(config: Config) -> Any:
    """What the models of a configuration hold: read from their config.json alone, and lengths that are null from their files."""
    config = config.model_copy(update={"student": settled_model(config.student)})
    student, student_shape = meta_model(config.student, "student", lora=config.train.lora)
    taught = config.taught.items() if config.losses.needs_teacher or config.cotrained else ()
    computing = [(key, settled_model(settings)) for key, settings in taught if teacher_class(settings.kind).computes]
    group_size, batch = 1 + config.data.negatives, config.train.batch_size

    def texts(model: Any, queries: int, length: int | None = None) -> list[tuple[int, int]]:
        return in_forwards(KINDS[model.kind].forwards(model, queries, queries * group_size, length), model.passes)

    @cache
    def student_activations(checkpointing: bool, length: int | None = None) -> int:
        part = min(batch, config.train.grad_cache or batch)  # GradCache keeps the activations of so many queries
        rows = texts(config.student, part, length)
        total = forward_bytes(student, rows, training=True, checkpointing=checkpointing)
        if config.cotrained is not None:
            settings = settled_model(config.cotrained)
            model = meta_model(settings, "teacher")[0]
            total += forward_bytes(model, texts(settings, part), training=True, checkpointing=checkpointing)
        return total

    def planned(key: str, settings: Any) -> PlannedTeacher:
        depth = None if settings.train else depth_needed(settings, config.losses_of(key))
        model, shape = meta_model(settings, "teacher", depth)

        @cache
        def activations(queries: int) -> int:
            return forward_bytes(model, texts(settings, queries), training=False)

        return PlannedTeacher(key, settings, shape, BYTES.get(settings.dtype, 2), activations)

    tree = read_deepspeed_config(config.deepspeed.student)
    zero = {zero_stage(tree): tree.get("zero_optimization", {})}
    for stage in (1, 2, 3):
        zero.setdefault(stage, read_deepspeed_config(f"ds_configs/student_zero{stage}.json")["zero_optimization"])
    return Requirements(
        config=config,
        student=student_shape,
        teachers=[planned(key, settings) for key, settings in computing],
        student_element=BYTES.get(config.student.dtype, 2),  # auto: half precision on a GPU
        group_size=group_size,
        student_activations=student_activations,
        lengths=lengths(config.student, student),
        student_zero=zero,
        teacher_zero={
            name: teacher_configuration(config.deepspeed, name)["zero_optimization"] for name in TEACHER_FILES
        },
    )


def in_forwards(texts: list[tuple[int, int]], passes: int | str | None) -> list[tuple[int, int]]:
    """(rows, length) of each forward of `texts`, at their longest: as they are, in so many passes, or packed into one."""
    if passes in (None, "auto"):  # auto reads fewer tokens
        return texts
    longest = max(length for _, length in texts)
    rows = math.ceil(sum(rows * length for rows, length in texts) / longest)
    forwards = 1 if passes == "packed" else min(int(passes), rows)
    return [(math.ceil(rows / forwards), longest)] * forwards


def lengths(settings: ModelConfig, backbone: Any) -> tuple[int, ...]:
    """The student's longest text as configured, half of it and twice, as far as the model reads."""
    length = KINDS[settings.kind].longest(settings)
    longest = int(getattr(backbone.config.get_text_config(), "max_position_embeddings", 0) or 2 * length)
    return tuple(n for n in (length // 2, length, 2 * length) if 0 < n <= longest or n == length)


TEACHER_FILES = {"zero3": "", "zero3+cpu": "teacher_zero3_cpu.json", "zero3+nvme": "teacher_zero3_nvme.json"}


def teacher_configuration(files: DeepSpeedFiles, placement: str) -> dict[str, Any]:
    """The DeepSpeed configuration of a placement: for zero3 the run's own."""

    name = TEACHER_FILES[placement]
    tree = read_deepspeed_config(f"ds_configs/{name}" if name else files.teacher)
    if placement == "zero3":
        tree.get("zero_optimization", {}).pop("offload_param", None)
    tree.setdefault("zero_optimization", {})
    return tree


def meta_model(
    settings: ModelConfig, role: str, depth: int | None = None, lora: LoraConfig | None = None
) -> tuple[Any, ModelShape]:
    """A model's backbone (a teacher's first `depth` layers) on the meta device, and its shape, from its files alone."""

    shape = read_model_config(settings)
    published_layers = int(shape.get_text_config().num_hidden_layers)
    with torch.device("meta"):
        architecture = getattr(transformers, str((shape.architectures or [""])[0]), None)
        published = sum(p.numel() for p in architecture(shape).parameters()) if architecture is not None else 0
    student = getattr(settings, "layers", None)
    module: Any
    module, backbone, features = KINDS[settings.kind].skeleton(settings, depth=depth, layers=student)
    if (width := getattr(settings, "width", None)) is not None:
        module = narrow(module, first_ones(sizes_after(width, module), module.num_layers))
        backbone, features = module.backbone, module.features_width
    if lora is not None:
        with torch.device("meta"):
            add_lora(module, lora)  # type: ignore[arg-type]  # a student is a scorer
    if role == "teacher" and not getattr(settings, "train", False):
        module.requires_grad_(False)
    layers = list(backbone.get_submodule(find_layers(backbone)[0]))
    found = ModelShape.of(module, layers, features=features, published=published)
    return backbone, found if depth is None else replace(found, published_layers=published_layers)
