"""`distill`: from a configuration to a student directory. Reads as the table of contents of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lead_ds.config import Config, save_config
from lead_ds.data.batches import Batches
from lead_ds.data.groups import open_groups
from lead_ds.data.tokens import TextEncoder
from lead_ds.engine.checkpoint import Checkpoints, write_json
from lead_ds.engine.evaluation import Evaluator
from lead_ds.engine.loop import Training
from lead_ds.engine.provenance import provenance
from lead_ds.engine.ranks import Ranks
from lead_ds.engine.ranks import ranks as joined_ranks
from lead_ds.engine.record import Recorder
from lead_ds.engine.teacher import FrozenTeacher, build_teacher, teacher_dtype
from lead_ds.engine.trainee import Trainee, build_engine, gathered_state_dict, student_dtype
from lead_ds.errors import InputError
from lead_ds.losses.selection import select_layers
from lead_ds.models.load import load_student, load_teacher
from lead_ds.models.student_dir import save_student
from lead_ds.report.card import model_card


def distill(config: Config, *, resume: bool = False, command: Sequence[str] = (), quiet: bool = False) -> Path:
    """Run (or, with `resume`, continue) the distillation that `config` describes; returns the student's directory.

    Every process of the run calls this. Raises InputError before anything is written where the input cannot work, and
    RunError, with the last checkpoint intact, where the work fails.
    """
    output = Path(config.output)
    with joined_ranks() as ranks:
        check_output(output, resume, ranks)

        # Everything that can be wrong with the input is found out before anything is written.
        groups = open_groups(config.data)
        student_text = TextEncoder.from_config(config.student)
        uses_teacher = config.teacher is not None and config.losses.needs_teacher
        teacher_text = TextEncoder.from_config(config.teacher) if uses_teacher and config.teacher else None
        batches = Batches(groups, student_text, teacher_text, in_chunks(config), rank=ranks.rank, world=ranks.world)
        evaluator = Evaluator.open(config, student_text, ranks)

        torch.manual_seed(config.seed)  # the same new layers on every rank
        dtype = student_dtype(config.student, ranks.device)
        student = load_student(config.student, dtype)
        cotrained = None
        if uses_teacher and config.teacher and config.teacher.train:
            cotrained = load_teacher(config.teacher, dtype)
        engine = build_engine(Trainee(student, cotrained).to(ranks.device), config, dtype, ranks)
        teacher = build_teacher(config, ranks) if uses_teacher and cotrained is None else None
        check_layers(config, student.num_layers, (teacher.scorer if teacher else cotrained))

        checkpoints = Checkpoints(output / "checkpoints", ranks, config.train.keep)
        state = find_state(config, checkpoints, engine, ranks) if resume else {}
        if ranks.main:
            write_facts(output, config, command, ranks, teacher)
        ranks.barrier()
        recorder = Recorder(
            output,
            ranks,
            engine,
            log_every=config.train.log_every,
            steps=config.train.steps,
            start=state.get("step", 0),
            quiet=quiet,
        )
        recorder.say(describe(config, ranks, student, teacher, len(groups)))
        training = Training(
            config=config,
            ranks=ranks,
            engine=engine,
            teacher=teacher,
            batches=batches,
            checkpoints=checkpoints,
            recorder=recorder,
            evaluator=evaluator,
            state=state,
        )
        try:
            best = training.run()
        finally:
            recorder.close()
        return export(config, output, engine, checkpoints, training, best, student_text, ranks)


def check_output(output: Path, resume: bool, ranks: Ranks) -> None:
    """Refuse to mix two runs in one folder, and to resume one that is not there."""
    holds = ranks.from_main((output / "config.yaml").exists())
    if holds and not resume:
        raise InputError(output, "already holds a run", "add --resume to continue it, or set output= to another folder")
    if resume and not holds:
        raise InputError(output, "holds no run to resume", "start it without --resume")
    if ranks.from_main(output.exists() and not output.is_dir()):
        raise InputError(output, "is a file", "set output= to a folder")


def in_chunks(config: Config) -> Config:
    """Where the teacher is co-trained or its attention is read, it sees the student's micro-batches, one by one."""
    teacher = config.teacher
    if teacher is None or not (teacher.train or config.losses.attention.weight > 0):
        return config
    texts = config.train.batch_size * (1 + config.data.negatives)
    return config.model_copy(update={"teacher": teacher.model_copy(update={"batch_size": texts})})


def check_layers(config: Config, student_layers: int, teacher: Any) -> None:
    """Draw once from each selection, so that a layer that does not exist is told at start."""
    if teacher is None:
        return
    for name in ("layer", "attention"):
        loss = getattr(config.losses, name)
        if loss.weight > 0:
            select_layers(loss, teacher.num_layers, student_layers, seed=config.seed, step=0)


def find_state(config: Config, checkpoints: Checkpoints, engine: Any, ranks: Ranks) -> dict[str, Any]:
    """Load the newest good checkpoint; its state, or {} where the run was ended before its first."""
    found = checkpoints.newest(tell=lambda text: print(text, file=sys.stderr, flush=True))
    if found is None:
        return {}
    path, state = found
    changed = changed_keys(state["config"], config.model_dump(mode="json"))
    if changed:
        raise InputError(
            path,
            f"was written with another configuration: {', '.join(changed)} changed",
            "resume with the configuration that is in the run's folder, config.yaml",
        )
    if state["processes"] != ranks.world:
        raise InputError(
            path,
            f"was written by {state['processes']} processes, this run has {ranks.world}",
            f"resume with {state['processes']}",
        )
    checkpoints.load(engine, path)
    return state


# What may differ between a run and its continuation: how often it speaks and saves, and where the same data lie now.
FREE_TO_CHANGE = {
    "output",
    "train.save_every",
    "train.log_every",
    "train.keep",
    "monitor",
    "data.path",
    "data.workers",
    "teacher.path",
}


def changed_keys(old: Any, new: Any, at: str = "") -> list[str]:
    """The dotted keys in which two plain configurations differ, of those that decide what a run computes."""
    if at in FREE_TO_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            changed
            for key in sorted(set(old) | set(new))
            for changed in changed_keys(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        ]
    return [] if old == new else [at]


def write_facts(
    output: Path, config: Config, command: Sequence[str], ranks: Ranks, teacher: FrozenTeacher | None
) -> None:
    """The resolved configuration, and where this run came from."""
    from lead_ds.kernels.dispatch import resolve

    output.mkdir(parents=True, exist_ok=True)
    kernels = resolve(config.kernels, torch.empty(0, device=ranks.device), kernel="layer_kl")
    facts: dict[str, Any] = {"kernels": kernels}
    if teacher is not None and config.teacher is not None:
        held, whole = teacher.parameter_bytes()
        facts["teacher"] = {
            "placement": teacher.placement,
            "dtype": str(teacher_dtype(config.teacher, ranks.device)),
            "parameter_bytes": whole,
            "parameter_bytes_per_rank": held,
        }
    write_json(output / "run.json", provenance(command, ranks.world, **facts))
    # Last: its presence is what marks the folder as holding a run.
    save_config(config, output / "config.yaml")


def describe(config: Config, ranks: Ranks, student: Any, teacher: FrozenTeacher | None, groups: int) -> str:
    """The first lines of a run."""
    depth = f"{student.num_layers} layers, {student.width} wide"
    lines = [f"student {config.student.path}: {depth}; {groups} groups; {ranks.world} process(es)"]
    if teacher is not None and config.teacher is not None:
        held, whole = teacher.parameter_bytes()
        lines.append(
            f"teacher {config.teacher.path}: {teacher.scorer.num_layers} layers, {teacher.placement}, "
            f"{held / 1e6:.1f} of {whole / 1e6:.1f} MB of parameters on each rank"
        )
    return "\n".join(lines)


def export(
    config: Config,
    output: Path,
    engine: Any,
    checkpoints: Checkpoints,
    training: Training,
    best: dict[str, Any] | None,
    encoder: TextEncoder,
    ranks: Ranks,
) -> Path:
    """Write the student's directory: of the best checkpoint where an evaluation chose one, else of the last step."""
    if best is not None and best["step"] != training.step:
        checkpoints.load(engine, checkpoints.folder / best["checkpoint"])
    student = engine.module.student
    state = gathered_state_dict(student, ranks)
    folder = output / "student"
    if ranks.main:
        save_student(student, encoder, folder, state_dict=state, card=model_card(config, output))
    ranks.barrier()
    return folder
