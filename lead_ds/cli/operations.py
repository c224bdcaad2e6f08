"""Commands around a run: plan (before it), doctor (of the machines it will use)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lead_ds.config import Config, ModelConfig
    from lead_ds.plan import ModelShape, Plan

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan(
    config: Path = typer.Argument(..., help="A YAML configuration.", metavar="CONFIG"),
    overrides: list[str] | None = typer.Argument(None, help="Settings to override.", metavar="[KEY=VALUE]..."),
    gpus: int = typer.Option(1, "--gpus", min=1, help="GPUs of each machine."),
    nodes: int = typer.Option(1, "--nodes", min=1, help="Machines."),
    gpu_memory: float = typer.Option(80.0, "--gpu-memory", min=1.0, help="GB (10^9 bytes) of each GPU."),
    host_memory: float | None = typer.Option(
        None, "--host-memory", min=1.0, help="GB of each machine; default: enough."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: bytes."),
    write: Path | None = typer.Option(
        None, "--write", help="Write the DeepSpeed configurations that it recommends here."
    ),
) -> None:
    """Memory per GPU by part, for every way to place the teacher, and the one that fits. Loads no weights, needs no GPU.

    Parameters, gradients and optimizer state are exact; activations are counted by running the model on tensors without
    data. Exit status 1 where nothing fits.
    """
    from rich.console import Console

    from lead_ds.config import load_config
    from lead_ds.plan import Cluster, activation_table, make_plan, plan_json, plan_table

    settings = load_config(config, overrides or [])
    room = None if host_memory is None else int(host_memory * 1e9)
    cluster = Cluster(gpus=gpus, nodes=nodes, gpu_memory=int(gpu_memory * 1e9), host_memory=room)
    made = make_plan(requirements(settings), cluster)
    files = write_configurations(made, settings, write) if write is not None and made.recommended else []
    if as_json:
        print(json.dumps({**plan_json(made), "files": [str(file) for file in files]}, indent=1))
    else:
        console = Console()
        for line in describe(made):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(plan_table(made))
        console.print(activation_table(made.requirements))
        for line in advise(made, config, files):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if made.recommended is None:
        raise typer.Exit(1)


def doctor(
    hostfile: Path | None = typer.Option(
        None, "--hostfile", help="DeepSpeed's: `host slots=N` lines. Checks each host."
    ),
    ssh_port: int | None = typer.Option(None, "--ssh-port", min=1, max=65535, help="Port of the hosts' ssh."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """What this machine, and each host of a hostfile, lacks - each with its remedy. Exit status 1 if anything is red."""
    from lead_ds.doctor import diagnose, show

    report = diagnose(hostfile, ssh_port=ssh_port)
    if as_json:
        print(json.dumps(report.plain(), indent=1))
    else:
        show(report)
    if report.red:
        raise typer.Exit(1)


def add_commands(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (plan, doctor):
        app.command()(command)


def requirements(config: Config) -> Any:
    """What the models of a configuration hold: read from their config.json alone."""
    from lead_ds.engine.deepspeed_config import read_deepspeed_config, zero_stage
    from lead_ds.engine.teacher import depth_needed
    from lead_ds.plan import Requirements
    from lead_ds.plan.activations import forward_bytes

    student, student_shape = meta_model(config.student, config.student.kind)
    teacher: Any = None
    teacher_shape = None
    taught = config.teacher is not None and config.teacher.kind != "cached"  # a cache takes no memory
    if taught and config.teacher is not None and (config.losses.needs_teacher or config.teacher.train):
        depth = None if config.teacher.train else depth_needed(config)
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
    from lead_ds.engine.deepspeed_config import read_deepspeed_config

    name = TEACHER_FILES[placement]
    tree = read_deepspeed_config(f"ds_configs/{name}" if name else config.deepspeed.teacher)
    if placement == "zero3":
        tree.get("zero_optimization", {}).pop("offload_param", None)
    tree.setdefault("zero_optimization", {})
    return tree


def meta_model(settings: ModelConfig, kind: str, depth: int | None = None) -> tuple[Any, ModelShape]:
    """A model's backbone (a teacher's first `depth` layers) on the meta device, and its shape, from its files alone."""
    import torch
    import transformers

    from lead_ds.config import StudentConfig, TeacherConfig
    from lead_ds.models.backbone import cut_shape, find_layers, read_model_config
    from lead_ds.models.load import load_student, load_teacher
    from lead_ds.plan import ModelShape

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
    from lead_ds.data.hub import find_file
    from lead_ds.models.dense import Dense
    from lead_ds.models.layout import read_json, read_layout

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


def write_configurations(made: Plan, config: Config, folder: Path) -> list[Path]:
    """Write the recommended student's and teacher's DeepSpeed configurations; their paths."""
    from lead_ds.engine.deepspeed_config import read_deepspeed_config, zero_stage
    from lead_ds.retrieval.files import write_json

    assert made.recommended is not None
    choice = made.recommended.choice
    student = read_deepspeed_config(config.deepspeed.student)
    if zero_stage(student) != choice.stage:
        student = read_deepspeed_config(f"ds_configs/student_zero{choice.stage}.json")
    trees = {"student": student}
    if choice.placement in TEACHER_FILES:
        trees["teacher"] = teacher_configuration(config, choice.placement)
    files = []
    for name, tree in trees.items():
        write_json(folder / f"{name}.json", tree)
        files.append(folder / f"{name}.json")
    return files


def describe(made: Plan) -> list[str]:
    """A line on each model."""
    r, lines = made.requirements, []
    for name, shape, element in (("student", r.student, r.student_element), ("teacher", r.teacher, r.teacher_element)):
        if shape is None:
            continue
        size, cut = shape.numel * element, shape.layers < shape.published_layers
        why = f"no layer above {shape.layers - 1} is read" if cut else "no language-model head"
        held = "" if shape.published == shape.numel else f" ({shape.numel / 1e9:.3f} B held: {why})"
        layers = f"{shape.layers} of {shape.published_layers}" if cut else f"{shape.layers}"
        lines.append(f"{name}: {shape.published / 1e9:.3f} B parameters{held}, {layers} layers, {size / 1e9:.2f} GB")
    return lines


def advise(made: Plan, config: Path, files: list[Path]) -> list[str]:
    """What to do now."""
    if made.recommended is None:
        return ["Nothing fits: use more GPUs, a smaller train.batch_size, or shorter texts."]
    total, choice = made.recommended.total / 1e9, made.recommended.choice
    changes = [c for c in made.changes if not (files and c.startswith("deepspeed."))]
    changes += [f"deepspeed.{file.stem}={file}" for file in files]
    if choice.placement == "zero3+nvme":
        changes.append("teacher.offload_path=A_FOLDER_ON_NVME")
    name = f"teacher {choice.placement}, " if choice.placement != "none" else ""
    return [
        f"recommended: {name}student ZeRO-{choice.stage}: {total:.1f} GB on each GPU",
        f"  distill {config} {' '.join(changes)}".rstrip(),
    ]
