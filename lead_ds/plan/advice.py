"""What to do with a plan: a line on each model, the command to run, the DeepSpeed configurations to run it with."""

from __future__ import annotations

from pathlib import Path

from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config, zero_stage
from lead_ds.io.files import write_json
from lead_ds.plan.placement import Plan
from lead_ds.plan.requirements import TEACHER_FILES, teacher_configuration
from lead_ds.settings.train import DeepSpeedFiles


def write_configurations(made: Plan, files: DeepSpeedFiles, folder: Path) -> list[Path]:
    """Write the recommended student's and teacher's DeepSpeed configurations; their paths."""

    assert made.recommended is not None
    choice = made.recommended.choice
    student = read_deepspeed_config(files.student)
    if zero_stage(student) != choice.stage:
        student = read_deepspeed_config(f"ds_configs/student_zero{choice.stage}.json")
    trees = {"student": student}
    if choice.placement in TEACHER_FILES:
        trees["teacher"] = teacher_configuration(files, choice.placement)
    written = [folder / f"{name}.json" for name in trees]
    for path, tree in zip(written, trees.values(), strict=True):
        write_json(path, tree)
    return written


def describe(made: Plan) -> list[str]:
    """A line on each model."""
    r, lines = made.requirements, []
    teachers = [(teacher.key, teacher.shape, teacher.element) for teacher in r.teachers]
    for name, shape, element in (("student", r.student, r.student_element), *teachers):
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
        changes += [f"{teacher.key}.offload_path=A_FOLDER_ON_NVME" for teacher in made.requirements.teachers]
    name = f"teacher {choice.placement}, " if choice.placement != "none" else ""
    return [
        f"recommended: {name}student ZeRO-{choice.stage}: {total:.1f} GB on each GPU",
        f"  distill {config} {' '.join(changes)}".rstrip(),
    ]
