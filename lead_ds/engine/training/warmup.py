"""`warmup`: one model, of any family that can be saved, trained on labels alone. A run whose losses read no teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lead_ds.config import Config, StudentConfig, TeacherConfig, losses_section
from lead_ds.config.facts import gives_vectors, reads_pairs
from lead_ds.config.load import parse_config
from lead_ds.engine.training.distill import train
from lead_ds.errors import InputError
from lead_ds.models.kinds.kind import KINDS, kinds_that
from lead_ds.settings.parse import load_tree
from lead_ds.settings.train import EvaluationConfig
from lead_ds.teachers.open import teacher_class


def warmup(
    config: Config, of: str = "student", resume: bool = False, command: Sequence[str] = (), quiet: bool = False
) -> Path:
    """Train the model of a configuration's section `of` on labels, or with `resume` continue; returns OUTPUT/model.

    The directory is one that `student.path` and `teacher.path` take: a dual encoder's, a ColBERT's or a cross-encoder's.
    Every process of the run calls this. Raises InputError and RunError as `lead_ds.engine.training.distill.distill`.
    """
    return train(warmup_config(config, of), "model", resume=resume, command=command, quiet=quiet)


def load_warmup(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration file for a warm-up: where it names no teacher, it need not switch off the losses that read one.

    Raises InputError as `lead_ds.config.load_config`.
    """
    tree = load_tree(path, overrides, Config)
    losses = tree.setdefault("losses", {})
    if tree.get("teacher") is None and not tree.get("teachers") and isinstance(losses, dict):
        for name in losses_section().model_fields:
            loss = losses.setdefault(name, {})
            if name != "contrastive" and isinstance(loss, dict):
                loss["weight"] = 0.0
    return parse_config(tree, path)


def warmup_config(config: Config, of: str = "student") -> Config:
    """The run that a warm-up is: the model of section `of` as student, no teacher, the contrastive loss alone.

    A teacher brings its own lr, temperature and lengths. Where it will be read by cosines it is trained on them: with
    vectors of unit length. Raises InputError for a section that is missing or whose kind cannot be trained on labels.
    """
    if of not in ("student", "teacher"):
        raise InputError("--of", f"{of!r} is not a model of the configuration", "use student or teacher")
    tree = config.model_dump()
    tree["train"]["overlap"] = False
    if of == "teacher":
        if config.teachers:
            raise InputError("teachers", "are several, and one is warmed up", "name that one alone: teacher")
        tree["student"] = trained(config.teacher)
        tree["train"]["lr"] = tree["teacher"]["lr"] or tree["train"]["lr"]
        contrastive = tree["losses"]["contrastive"]
        contrastive["temperature"] = contrastive["teacher_temperature"] or contrastive["temperature"]
        # What the configuration sets for its student's relevance and evaluation may be nothing that the teacher has.
        if reads_pairs(tree["student"]["kind"]):
            contrastive["scope"], tree["train"]["in_batch"] = "auto", "global"
        if gives_vectors(tree["student"]["kind"]):
            tree["evaluation"] |= EvaluationConfig().model_dump(include={"run", "depth"})
    tree["losses"]["contrastive"]["teacher_temperature"] = None
    tree["student"]["scale"] = "none"  # of its layers, which labels do not read
    tree["teacher"], tree["teachers"], tree["mix"] = None, [], {}
    for name, loss in tree["losses"].items():
        # A configuration that distils without labels can be warmed up, too.
        loss["weight"] = (loss["weight"] or 1.0) if name == "contrastive" else 0.0
    return parse_config(tree, "warmup")


def trained(teacher: TeacherConfig | None) -> dict[str, Any]:
    """A teacher's section as that of a student."""
    if teacher is None:
        raise InputError("teacher", "is missing", "add the section, or warm up the student: --of student")
    if not teacher_class(teacher.kind).computes:
        what = f"a teacher of kind {teacher.kind} has no weights to train"
        raise InputError("teacher.kind", what, "name the model and its kind")
    if not KINDS[teacher.kind].can_be_trained:
        what = f"a model read as {teacher.kind} is not trained here"
        others = kinds_that("can_be_trained")
        raise InputError("teacher.kind", what, f"read the same model as one of {others}: it is given what it lacks")
    known = StudentConfig.of(teacher.kind).model_fields
    section = {name: value for name, value in teacher.model_dump().items() if name in known}
    if teacher.scale == "cosine" and not KINDS[teacher.kind].reads_pairs and teacher.normalize is None:
        section["normalize"] = True
    return section
