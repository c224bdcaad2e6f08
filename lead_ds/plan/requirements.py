"""What the models of a configuration hold, read from their config.json alone: no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers

from lead_ds.config import Config, StudentConfig, TeacherConfig
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config, zero_stage
from lead_ds.io.hub import find_file
from lead_ds.models.backbone import cut_shape, find_layers, read_model_config
from lead_ds.models.dense import Dense
from lead_ds.models.layout import read_json, read_layout
from lead_ds.models.load import load_student, load_teacher
from lead_ds.plan.activations import forward_bytes
from lead_ds.plan.placement import Requirements
from lead_ds.plan.shapes import ModelShape
from lead_ds.settings.model import ModelConfig
from lead_ds.teachers.frozen import depth_needed
from lead_ds.teachers.open import teacher_class

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def requirements(config: Config) -> Any:
    """What the models of a configuration hold: read from their config.json alone."""

    student, student_shape = meta_model(config.student, config.student.kind)
    teacher: Any = None
    teacher_shape = None
    taught = config.teacher is not None and teacher_class(config.teacher.kind).computes
    if taught and config.teacher is not None and (config.losses.needs_teacher or config.teacher.train):
        depth = None if config.teacher.train else depth_needed(config.teacher, config.losses)
        teacher, teacher_shape = meta_model(config.teacher, config.teacher.kind, depth)
    group, batch = 1 + config.data.negatives, config.train.batch_size

    def texts(model: Any, queries: int, length: int | None = None) -> list[tuple[int, int]]:
        if model.kind in ("cross_encoder", "llm_reranker"):
            found = [(queries * group, length or model.max_length)]
        else:
            found = [(queries, model.query_length), (queries * group, length or model.passage_length)]
        return in_forwards(found, model.passes)

    @cache
    def student_activations(checkpointing: bool, length: int | None = None) -> int:
        part = min(batch, config.train.grad_cache or batch)  # GradCache keeps the activations of so many queries
        rows = texts(config.student, part, length)
        total = forward_bytes(student, rows, training=True, checkpointing=checkpointing)
        if config.teacher is not None and config.teacher.train:
            total += forward_bytes(teacher, texts(config.teacher, part), training=True, checkpointing=checkpointing)
        return total

    @cache
    def teacher_activations(queries: int) -> int:
        return forward_bytes(teacher, texts(config.teacher, queries), training=False)

    tree = read_deepspeed_config(config.deepspeed.student)
    zero = {zero_stage(tree): tree.get("zero_optimization", {})}
    for stage in (1, 2, 3):
        zero.setdefault(stage, read_deepspeed_config(f"ds_configs/student_zero{stage}.json")["zero_optimization"])
    return Requirements(
        config=config,
        student=student_shape,
        teacher=teacher_shape,
        student_element=BYTES.get(config.student.dtype, 2),  # auto: half precision on a GPU
        teacher_element=BYTES.get(config.teacher.dtype if config.teacher else "auto", 2),
        group=group,
        student_activations=student_activations,
        lengths=lengths(config, student),
        teacher_activations=teacher_activations,
        student_zero=zero,
        teacher_zero={name: teacher_configuration(config, name)["zero_optimization"] for name in TEACHER_FILES},
    )


def in_forwards(texts: list[tuple[int, int]], passes: int | str | None) -> list[tuple[int, int]]:
    """(rows, length) of each forward of `texts`, at their longest: as they are, in so many passes, or packed into one."""
    if passes is None:
        return texts
    longest = max(length for _, length in texts)
    rows = math.ceil(sum(rows * length for rows, length in texts) / longest)
    forwards = 1 if passes == "packed" else min(int(passes), rows)
    return [(math.ceil(rows / forwards), longest)] * forwards


def lengths(config: Config, backbone: Any) -> tuple[int, ...]:
    """The student's longest text as configured, half of it and twice, as far as the model reads."""
    pairs = config.student.kind == "cross_encoder"
    length = config.student.max_length if pairs else config.student.passage_length
    longest = int(getattr(backbone.config.get_text_config(), "max_position_embeddings", 0) or 2 * length)
    return tuple(n for n in (length // 2, length, 2 * length) if 0 < n <= longest or n == length)


TEACHER_FILES = {"zero3": "", "zero3+cpu": "teacher_zero3_cpu.json", "zero3+nvme": "teacher_zero3_nvme.json"}


def teacher_configuration(config: Config, placement: str) -> dict[str, Any]:
    """The DeepSpeed configuration of a placement: for zero3 the run's own."""

    name = TEACHER_FILES[placement]
    tree = read_deepspeed_config(f"ds_configs/{name}" if name else config.deepspeed.teacher)
    if placement == "zero3":
        tree.get("zero_optimization", {}).pop("offload_param", None)
    tree.setdefault("zero_optimization", {})
    return tree


def meta_model(settings: ModelConfig, kind: str, depth: int | None = None) -> tuple[Any, ModelShape]:
    """A model's backbone (a teacher's first `depth` layers) on the meta device, and its shape, from its files alone."""

    shape = read_model_config(settings)
    random = settings.model_copy(update={"weights": "random"})
    with torch.device("meta"):
        architecture = getattr(transformers, str((shape.architectures or [""])[0]), None)
        published = sum(p.numel() for p in architecture(shape).parameters()) if architecture is not None else 0
        published_layers = int(shape.get_text_config().num_hidden_layers)
        if depth is not None:
            cut_shape(shape, range(depth))
        module: Any
        if kind == "llm_reranker":  # the scorer needs a tokenizer for its answers; its parameters are the backbone's
            module = transformers.AutoModel.from_config(shape, trust_remote_code=settings.trust_remote_code)
            backbone = module
        elif isinstance(random, TeacherConfig):
            module = load_teacher(random, torch.bfloat16, depth)
            backbone = module.backbone
        else:
            assert isinstance(random, StudentConfig)
            module = load_student(random, torch.bfloat16)
            backbone = module.backbone
        features = add_saved_dense(module, settings, kind)
    if not (isinstance(settings, StudentConfig) or getattr(settings, "train", False)):
        module.requires_grad_(False)
    layers = list(backbone.get_submodule(find_layers(backbone)[0]))
    found = ModelShape.of(module, layers, features=features, published=published)
    return backbone, found if depth is None else replace(found, published_layers=published_layers)


def add_saved_dense(module: Any, settings: ModelConfig, kind: str) -> int:
    """Give `module` the Dense layers that are saved beside the weights; the width of the vectors it then makes."""

    width = int(getattr(module, "width", 0)) or int(module.config.get_text_config().hidden_size)
    if kind not in ("dual_encoder", "colbert"):
        return width
    layout = read_layout(settings.path, late_interaction=kind == "colbert")
    if settings.weights == "pretrained" and layout.dense and len(module.dense) == 0:
        for folder in layout.dense:
            file = find_file(settings.path, f"{folder}/config.json")
            saved = read_json(file) if file is not None else {}
            dense = Dense(
                int(saved["in_features"]),
                int(saved["out_features"]),
                bias=bool(saved.get("bias", True)),
                residual=bool(saved.get("use_residual", False)),
            )
            module.dense.append(dense)
    return int(module.dense[-1].out_features) if len(module.dense) else width
