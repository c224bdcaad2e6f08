"""`distill`: from a configuration to a student directory. `train` reads as the table of contents of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lead_ds.config import Config, save_config
from lead_ds.config.facts import span_of
from lead_ds.data.batches import Batches
from lead_ds.data.groups.group import Groups
from lead_ds.data.groups.open import open_groups
from lead_ds.data.groups.schedule import scheduled
from lead_ds.data.reads import Reads, passes_of
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.engine.distributed.agreement import agreed, check_agreement, check_shared
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config, zero_stage
from lead_ds.engine.distributed.ranks import Ranks, closed_to_others
from lead_ds.engine.distributed.ranks import ranks as joined_ranks
from lead_ds.engine.distributed.signals import Signals, Stop
from lead_ds.engine.distributed.watchdog import Watchdog
from lead_ds.engine.records.checkpoint import Checkpoints, write_json
from lead_ds.engine.records.phases import Phases
from lead_ds.engine.records.profile import Profile
from lead_ds.engine.records.recorder import Recorder
from lead_ds.engine.training.alone import refuse_what_needs_groups
from lead_ds.engine.training.averaging import average
from lead_ds.engine.training.card import model_card
from lead_ds.engine.training.described import describe, kernels_used, readings
from lead_ds.engine.training.evaluation import Evaluator, Evaluators, open_evaluator
from lead_ds.engine.training.fitting import fit, keep_map, save_fitted
from lead_ds.engine.training.given import NOTHING, Given, check_given
from lead_ds.engine.training.loop import Bookkeeping, Training
from lead_ds.engine.training.narrowing import kept_facts, narrowed, save_kept
from lead_ds.engine.training.numerics import backends_of, fit_attention, fixed_order
from lead_ds.engine.training.objective import Selected, build_objective
from lead_ds.engine.training.resume import check_inputs, compared, evaluation_facts, lens_facts, load_state, newest
from lead_ds.engine.training.trainee import Trainee, build_engine, gathered_state_dict, student_dtype
from lead_ds.errors import InputError, RunError
from lead_ds.io.owner import owned
from lead_ds.io.provenance import provenance
from lead_ds.io.shards import refuse_other
from lead_ds.losses.objective import Objective
from lead_ds.models.as_read import check_room
from lead_ds.models.load import load_teacher, settled_model, with_lengths
from lead_ds.models.lora import add_lora, without_lora
from lead_ds.models.narrow import Kept
from lead_ds.models.own import OwnEncoder
from lead_ds.models.packing_check import check_packing
from lead_ds.models.student_dir import save_student
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.teachers.frozen import FrozenTeacher, at_once
from lead_ds.teachers.informative import informative
from lead_ds.teachers.open import teacher_class
from lead_ds.teachers.own import OwnTeacher
from lead_ds.teachers.teacher import Lesson, Teacher


def distill(
    config: Config, *, resume: bool = False, command: Sequence[str] = (), quiet: bool = False, given: Given = NOTHING
) -> Path:
    """Run (or, with `resume`, continue) the distillation that `config` describes; returns the student's directory.

    given: parts of the run that are Python objects. Every process of the run calls this. Raises InputError before anything
    is written where the input cannot work, and RunError, with the last checkpoint intact, where the work fails.
    """
    return train(config, "student", resume=resume, command=command, quiet=quiet, given=given)


def train(
    config: Config, product: str, *, resume: bool, command: Sequence[str], quiet: bool, given: Given = NOTHING
) -> Path:
    """Train the configuration's student by its losses, with a teacher or without; the directory OUTPUT/`product`.

    Called, and raises, as `distill`.
    """
    minutes = config.train.watchdog_minutes
    # The watchdog comes before the collectives' own timeout, which could not say who hangs.
    with joined_ranks(minutes + 5 if minutes else 30.0) as ranks:
        # A function of its own: what it holds has gone when the ranks part, and lets go of their groups.
        return train_together(config, product, ranks, resume=resume, command=command, quiet=quiet, given=given)


def train_together(
    config: Config, product: str, ranks: Ranks, *, resume: bool, command: Sequence[str], quiet: bool, given: Given
) -> Path:
    """`train`, of ranks that have met."""
    output, signals = Path(config.output), Signals()
    with (
        closed_to_others(),
        fixed_order(config.train.deterministic),
        Watchdog(ranks, config.train.watchdog_minutes, output, signals) as watchdog,
        ExitStack() as held,
    ):
        check_agreement(config, resume, ranks)
        check_output(output, resume, ranks)
        held.enter_context(owned(output, "another run", ranks))
        check_output(output, resume, ranks)  # again: who had the folder until now may have left a run in it
        check_shared(output, ranks)
        kernels_used(config.kernels, ranks)  # reported now, where they cannot run
        config = agreed(ranks, lambda: settled(config, given))

        checkpoints = Checkpoints(output / "checkpoints", ranks, config.train.keep, whole=config.train.lora is None)
        found = newest(checkpoints) if resume else None
        measured: dict[str, str] = {} if found is None else found[1].get("attention", {})

        # Everything that can be wrong with the input is found out before anything is written.
        groups, student_text, batches, evaluator = agreed(ranks, lambda: open_inputs(config, ranks, given))
        check_given(groups, given, ranks)
        torch.manual_seed(config.seed)  # the same new layers on every rank
        dtype = student_dtype(config.student, ranks.device)
        student = agreed(ranks, lambda: given.load_student(config.student, dtype))
        student, kept = narrowed(config.student.width, student, batches, ranks, output if resume else None)
        cotrained, trained_along = None, config.cotrained
        if trained_along is not None and batches.teachers:
            cotrained = agreed(ranks, lambda: load_teacher(trained_along, dtype))
        for scorer, reads in zip((student, cotrained), (batches.student, *batches.teachers.values()), strict=False):
            if scorer is not None:
                check_vocabulary(scorer, reads.encoder, scorer.config.path)
        if (lora := config.train.lora) is not None:
            agreed(ranks, lambda: add_lora(student, lora))
        trainee = Trainee(student, cotrained).to(ranks.device)
        fit_attention(trainee, config.student, batches, dtype, ranks, measured.get("student"))
        teachers = open_teachers(config, batches, ranks, given, measured) if cotrained is None else {}
        taught = [*teachers.values()] if cotrained is None else [cotrained]
        keep_map(config, student, taught, batches, ranks)
        trainee.losses = build_objective(config, student, taught, batches, ranks).to(ranks.device)
        fits = kept_facts(kept) | fit(trainee.losses, student, taught, batches, ranks, output if resume else None)
        for key, scorer in (("student", student), ("teacher", cotrained)):
            if scorer is not None and scorer.config.passes == "packed":
                check_packing(scorer, scorer.all_layers, f"{key}.passes")
            if scorer is not None:
                scorer.capture.uninstall()  # what ran until now must not stand before DeepSpeed's hooks
        # Drawn once, so that a layer that does not exist is reported at start, where it can be before folders are made.
        if config.losses.informative is None:
            Selected.of(config, student, taught, [[]] * len(taught)).pairs(step=0)
        engine = build_engine(trainee, config, dtype, ranks)

        state = load_state(config, checkpoints, found, engine, ranks)
        measured_on = evaluation_facts(evaluator, groups) if ranks.main else {}
        check_inputs(config, state, batches, ranks, {**fits, **lens_facts(teachers), **measured_on}, given.accepted)
        state["attention"] = backends_of({"student": student, **teachers})
        state["informative"] = layers_that_know(config, state, teachers, batches, ranks)
        Selected.of(config, student, taught, state["informative"]).pairs(step=0)
        checkpoints.clear()  # killed after its last checkpoint, a run writes no further one that would do it
        recorder = Recorder(
            output,
            ranks,
            engine,
            stop=Stop(signals, ranks),
            train=config.train,
            start=state.get("step", 0),
            quiet=quiet,
            callbacks=given.callbacks,
        )
        recorder.say(describe(config, ranks, student, teachers, len(groups)))
        if ranks.main:
            scorers = (
                [cotrained] if cotrained is not None else [getattr(one, "scorer", None) for one in teachers.values()]
            )
            for line in readings(groups, batches, student, scorers):
                recorder.say(line)
        for key, layers in zip(teachers, state["informative"], strict=False):
            if layers:
                recorder.say(f"informative layers of the {key}: {', '.join(map(str, layers))}")
        training = Training(
            config=config,
            ranks=ranks,
            engine=engine,
            teachers=teachers,
            batches=batches,
            evaluator=evaluator,
            books=Bookkeeping(checkpoints, recorder, watchdog, profile_of(config, ranks, recorder, state)),
            state=state,
        )
        fitted = trainee.losses, kept
        # Not earlier: a folder that holds a run is refused to another, so what cannot begin must not leave one.
        agreed(
            ranks, lambda: write_facts(output, config, command, ranks, teachers, fitted, state) if ranks.main else None
        )
        with signals:
            try:
                best = training.run()
            except InputError:
                # The first step reports what only it can see, such as attention maps that cannot be compared.
                if ranks.main and not resume and training.step == 0:
                    (output / "config.yaml").unlink()
                raise
            finally:
                recorder.close()
        watchdog.at("export")
        return export(config, output / product, engine, checkpoints, training, best, student_text, ranks)


def settled(config: Config, given: Given = NOTHING) -> Config:
    """The configuration with what its models' files say of them: lengths, and what a cache was made with.

    Raises InputError for a loss that a teacher cannot serve, and as `load_text`.
    """
    student = config.student
    own = given.student is not None
    models: dict[str, Any] = {"student": with_lengths(student, given.student_text) if own else settled_model(student)}
    found: list[Any] = []
    for key, settings in config.taught.items() if config.losses.needs_teacher else ():
        kind = teacher_class(settings.kind)
        teacher = kind.settled(settings)
        if kind.computes and key in given.teachers:
            teacher = with_lengths(teacher, partial(given.teacher_text, key))
        elif kind.computes:
            teacher = settled_model(teacher)
        found.append(teacher)
    if found:
        models |= {"teachers": found} if config.teacher is None else {"teacher": found[0]}
    return config.model_copy(update=models)


def open_inputs(
    config: Config, ranks: Ranks, given: Given = NOTHING
) -> tuple[Groups, TextEncoder, Batches, Evaluator | Evaluators | None]:
    """The training groups, the student's tokenisation, the batches and the evaluation of a run."""
    groups = given.groups or open_groups(config.data)
    if groups.alone:
        refuse_what_needs_groups(config)
    groups = scheduled(config.data, groups)
    for teacher in config.taught.values() if config.losses.needs_teacher else ():
        groups = teacher_class(teacher.kind).drawn(groups)
    student_text = given.student_text(config.student)
    check_room(student_text, "student")
    batches = open_batches(config, groups, student_text, ranks, given)
    for key, reads in batches.teachers.items():
        if reads.encoder is not None:
            check_room(reads.encoder, key)
    batches.check(compared(config.train, ranks.world))
    return groups, student_text, batches, open_evaluator(config, student_text, ranks)


def open_batches(config: Config, groups: Groups, encoder: TextEncoder, ranks: Ranks, given: Given = NOTHING) -> Batches:
    """The windows of a run: its groups, as the student and the teachers that its losses read are given them."""
    alone = config.student.passages == "teacher"
    sharded = zero_stage(read_deepspeed_config(config.deepspeed.student)) == 3
    tapped = bool(config.losses.needing("attention"))
    passes = passes_of(config.student.passes, sharded=sharded, tapped=tapped, device=ranks.device)
    student = Reads(encoder, passes=passes, queries_at_once=config.train.grad_cache, queries_alone=alone)
    teachers: dict[str, Reads] = {}
    for key, settings in config.taught.items() if config.losses.needs_teacher else ():
        text = given.teacher_text(key, settings)
        if text is not None:
            teachers[key] = Reads(text, at_once=at_once(settings, config.data))
        else:
            teachers[key] = teacher_class(settings.kind).reads(Lesson.of(config, key), groups, ranks)
        teachers[key] = replace(teachers[key], span=span_of(settings))
    return Batches(groups, student, teachers, config.data, config.train, seed=config.seed, ranks=ranks)


def open_teachers(
    config: Config, batches: Batches, ranks: Ranks, given: Given = NOTHING, measured: Mapping[str, str] | None = None
) -> dict[str, Teacher]:
    """The teachers that are not trained, by their keys in the configuration.

    measured: the attention backends that the run chose before it was interrupted, by the models' keys."""
    return {
        key: open_teacher(Lesson.of(config, key, (measured or {}).get(key)), key, place, batches, ranks, given)
        for place, key in enumerate(batches.teachers)
    }


def open_teacher(lesson: Lesson, key: str, place: int, batches: Batches, ranks: Ranks, given: Given) -> Teacher:
    """One of them. place: of those that `batches` serve."""
    if key in given.teachers:
        module = given.teachers[key]
        return OwnTeacher(agreed(ranks, lambda: OwnEncoder(module, lesson.teacher)), ranks.device)
    kind = teacher_class(lesson.teacher.kind)
    teacher = kind.open(lesson, batches.teachers[key], lambda: batches.window(0).teachers[place], ranks)
    if isinstance(teacher, FrozenTeacher) and teacher.placement == "replicate":
        batches.teachers[key] = batches.teachers[key].replicated
    return teacher


def layers_that_know(
    config: Config, state: dict[str, Any], teachers: Mapping[str, Teacher], batches: Batches, ranks: Ranks
) -> list[list[int]]:
    """The informative layers of each teacher: those of the checkpoint, or measured."""
    known = state.get("informative")
    if known is not None:
        return known if known and isinstance(known[0], list) else [known]  # an earlier version had one teacher
    measured = enumerate(teachers.items())
    return [informative(config.losses_of(key), one, place, batches, ranks) for place, (key, one) in measured] or [[]]


def check_output(output: Path, resume: bool, ranks: Ranks) -> None:
    """Refuse to mix two runs in one folder, and to resume one that is not there."""
    holds = ranks.from_main((output / "config.yaml").exists())
    if holds and not resume:
        raise InputError(output, "already holds a run", "add --resume to continue it, or set output= to another folder")
    if resume and not holds:
        raise InputError(output, "holds no run to resume", "start it without --resume")
    if ranks.from_main(output.exists() and not output.is_dir()):
        raise InputError(output, "is a file", "set output= to a folder")
    agreed(ranks, lambda: refuse_other(output, "config.yaml", "set output= to another folder") if ranks.main else None)
    nearest = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    if not ranks.from_main(nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise InputError(
            output, f"cannot be made: {nearest} is not a folder that you may write to", "set output= to another"
        )


def profile_of(config: Config, ranks: Ranks, recorder: Recorder, state: dict[str, Any]) -> Phases:
    """The profile that the configuration asks for; parts that are not timed without one."""
    if config.profile is None:
        return Phases()
    return Profile(config.profile, Path(config.output), ranks, recorder.say, start=state.get("step", 0))


def write_facts(
    output: Path,
    config: Config,
    command: Sequence[str],
    ranks: Ranks,
    teachers: Mapping[str, Teacher],
    fitted: tuple[Objective | None, Kept],
    state: Mapping[str, Any],
) -> None:
    """The resolved configuration, and where this run came from, with the changed inputs that it went on with.

    fitted: what was fitted before the first step: of the losses, and of the student's width.
    Raises InputError where the folder cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(output, f"cannot be made: {error.strerror}", "set output= to another folder") from None
    facts: dict[str, Any] = {"kernels": kernels_used(config.kernels, ranks)}
    if state["accepted"]:
        facts["accepted_changes"] = state["accepted"]
    described = [teacher.facts() for teacher in teachers.values()]
    if described:
        facts |= {"teacher": described[0]} if config.teacher is not None else {"teachers": described}
    write_json(output / "run.json", provenance(command, ranks.world, **facts))
    save_fitted(fitted[0], output)
    save_kept(fitted[1], output)
    # Last: its presence is what marks the folder as holding a run.
    save_config(config, output / "config.yaml")


def export(
    config: Config,
    folder: Path,
    engine: Any,
    checkpoints: Checkpoints,
    training: Training,
    best: dict[str, Any] | None,
    encoder: TextEncoder,
    ranks: Ranks,
) -> Path:
    """Write the trained model's directory: of the best checkpoint where an evaluation chose one, else of the last step; or of
    the mean of the last checkpoints."""
    if config.train.average is not None:
        average(config, engine, checkpoints, training.evaluator, ranks)
    elif best is not None and best["step"] != training.step:
        try:
            checkpoints.load(engine, checkpoints.folder / best["checkpoint"])
        except RunError as error:
            if ranks.main:
                print(f"the best checkpoint is lost, the last step is exported: {error}", file=sys.stderr, flush=True)
    student = engine.module.student
    state = gathered_state_dict(student, ranks)
    if ranks.main:
        if state is not None and config.train.lora is not None:
            state = without_lora(student, state)
        save_student(student, encoder, folder, state_dict=state, card=model_card(config, folder.parent))
    ranks.barrier()
    return folder
