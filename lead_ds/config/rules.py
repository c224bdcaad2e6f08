"""Rules that bind several sections: each names the setting to change, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from lead_ds.config.broken import Broken, Rule
from lead_ds.config.facts import (
    GIFTS,
    computes,
    fed,
    gives_vectors,
    phases,
    reads_pairs,
    scoped,
    span_of,
    trained,
)
from lead_ds.config.vector_rules import (
    first_dimensions_are_of_what_is_read,
    queries_alone_have_an_index,
    widths_are_of_vectors,
)
from lead_ds.settings.roles import CachedRole, Span, TeacherRole
from lead_ds.settings.run import Run


def broken(config: Run) -> Broken | None:
    """The first rule that a configuration breaks."""
    return next((found for rule in RULES for found in rule(config)), None)


def losses_have_a_teacher(config: Run) -> Iterator[Broken]:
    """A loss with a weight that reads a teacher needs one."""
    if config.losses.needs_teacher and not config.taught:
        readers = ", ".join(config.losses.needing("final", "layers", "features", "attention"))
        yield Broken(
            "teacher", f"a teacher section is missing: {readers} of losses read one", "name the model to learn from"
        )


def labels_have_something_to_compare(config: Run) -> Iterator[Broken]:
    """Within a query's own passages, labels say something only where there are negatives."""
    for name, loss in scoped(config):
        in_group = reads_pairs(config.student.kind) or loss.scope == "group"
        if in_group and config.data.negatives == 0:
            what = f"is 0: the {name} loss of a model of pairs, and of scope: group, compares a query's own passages"
            yield Broken("data.negatives", what, "set it to 1 or more")


def pairs_have_something_to_compare(config: Run) -> Iterator[Broken]:
    """A model of pairs is compared over a query's own passages, and a distribution over one holds no information."""
    models = [config.student.kind, *(teacher.kind for teacher in config.taught.values())]
    if any(map(reads_pairs, models)) and config.losses.needs_teacher and config.data.negatives == 0:
        what = "is 0: a model that reads pairs is compared over a query's own passages, and there is but one"
        yield Broken("data.negatives", what, "set it to 1 or more")


def scope_is_one_that_pairs_have(config: Run) -> Iterator[Broken]:
    """A student that reads pairs has scores of a query's own passages alone: the batch's cannot be requested."""
    if not reads_pairs(config.student.kind):
        return
    kind = f"is ignored by a {config.student.kind}, which scores a query's own passages alone"
    for name, loss in scoped(config):
        if loss.scope == "batch":
            yield Broken(f"losses.{name}.scope", f"batch {kind}", "set it to auto, or group")
    if config.train.in_batch == "local":
        yield Broken("train.in_batch", f"local {kind}", "take it out")


def templates_are_of_frozen_models(config: Run) -> Iterator[Broken]:
    """What is trained is saved, and read elsewhere, as its own files say."""
    for key, model in trained(config):
        for name in ("template", "instruction"):
            if getattr(model, name, None) is not None:
                yield Broken(
                    f"{key}.{name}",
                    "is read by a frozen model alone: it is not saved with a trained one",
                    "take it out",
                )


def packed_rows_are_passes(config: Run) -> Iterator[Broken]:
    """Gradient caching cuts a batch into passes of its own."""
    if config.train.grad_cache is None:
        return
    for key, model in trained(config):
        if model.passes == "packed":
            yield Broken(f"{key}.passes", "packed: train.grad_cache makes passes of its own", "set it to null")


def maps_come_whole(config: Run) -> Iterator[Broken]:
    """Attention maps are those of one forward over the batch as it is."""
    off = " and ".join(f"losses.{name}.weight: 0" for name in config.losses.needing("attention"))
    settings = {
        "train.grad_cache": config.train.grad_cache,
        "student.passes": config.student.passes,
        **{f"{key}.passes": getattr(teacher, "passes", None) for key, teacher in config.taught.items()},
        "train.overlap": config.train.overlap or None,
    }
    for key, value in settings.items():
        if off and value not in (None, "auto"):
            yield Broken(key, "has no attention maps", f"set it to {'false' if value is True else 'null'}, or {off}")


def informative_layers_stay_so(config: Run) -> Iterator[Broken]:
    """Which layers are informative is measured once."""
    if config.cotrained is not None and config.losses.informative is not None:
        what = "the losses select informative layers, which are measured once, of a frozen teacher"
        yield Broken("teacher.train", what, "set it to false, or choose another select")


def a_lens_has_one_state_to_read(config: Run) -> Iterator[Broken]:
    """A tuned lens reads one state per text, or pair."""
    from lead_ds.models.kinds.kind import KINDS

    for key, teacher in config.taught.items():
        if not isinstance(teacher, TeacherRole) or teacher.lens == "head" or teacher.kind not in KINDS:
            continue
        if KINDS[teacher.kind].lens_form is None:
            has = "none of its layers" if KINDS[teacher.kind].gives_vectors else "one per token"
            what = f"tuned: a tuned lens reads one state per text, a {teacher.kind} has {has}"
            yield Broken(f"{key}.lens", what, "set it to head")
        if teacher.lens_path is None and config.teacher is None:
            yield Broken(f"{key}.lens_path", "is missing: of several teachers, each has a lens of its own", "name it")


def a_lens_path_names_a_lens(config: Run) -> Iterator[Broken]:
    """A folder of a tuned lens is read where layers are read through one; of a cache, it says through which."""
    for key, teacher in config.taught.items():
        if not isinstance(teacher, TeacherRole) or isinstance(teacher, CachedRole):
            continue
        if teacher.lens == "head" and teacher.lens_path is not None:
            yield Broken(f"{key}.lens_path", "is ignored by lens: head", f"set {key}.lens: tuned, or take it out")


def a_lens_has_layers_to_read(config: Run) -> Iterator[Broken]:
    """Only layers are read through a tuned lens; the final state is read as the model serves it."""
    of_layers, losses = config.losses.needing("layers"), config.losses
    reading = {*of_layers, *(name for name in losses.needing("features") if getattr(getattr(losses, name), "count", 0))}
    for key, teacher in config.taught.items():
        tuned = getattr(teacher, "lens", "head") == "tuned" and not isinstance(teacher, CachedRole)
        if tuned and not (config.losses.needs_teacher and reading & fed(config, teacher)):
            what = "tuned is ignored: no loss that it feeds reads layers"
            yield Broken(f"{key}.lens", what, "set it to head, or losses.layer.weight above 0")


def sharding_is_of_a_sharded_teacher(config: Run) -> Iterator[Broken]:
    """DeepSpeed's file of the teacher is read where a frozen teacher may be sharded."""
    usual = type(config.deepspeed).model_fields["teacher"].default
    if config.deepspeed.teacher == usual:
        return
    shares = ("auto", "zero3")  # auto: decided by the memory there is
    if not any(getattr(one, "placement", None) in shares and not one.train for one in config.taught.values()):
        what = "is ignored: no frozen teacher of this run can be sharded"
        yield Broken("deepspeed.teacher", what, "take it out, or set teacher.placement: zero3")


def teacher_gives_what_losses_read(config: Run) -> Iterator[Broken]:
    """A teacher that is not a model of this run gives less than one that is."""
    from lead_ds.teachers.open import teacher_class

    for key, teacher in config.taught.items():
        alone, named = key == "teacher", getattr(teacher, "losses", None)
        for need, what in GIFTS.items() if alone or named is not None else ():
            for name in config.losses.needing(need) if need not in teacher_class(teacher.kind).gives else ():
                where, remedy = f"losses.{name}.weight", "set it to 0, or name the model itself with its kind"
                if not alone:
                    where, remedy = f"{key}.losses", f"take {name} out, or name the model itself with its kind"
                if alone or name in (named or ()):
                    yield Broken(where, f"a teacher of kind {teacher.kind} has no {what}", remedy)


def several_teachers_share(config: Run) -> Iterator[Broken]:
    """Every one of several feeds a loss, and every loss that reads a teacher is fed."""
    if config.teacher is not None and len(config.taught) > 1:
        yield Broken("teachers", "are given beside teacher", "put that one into the list, or take one of the two out")
    if config.teacher is not None or not config.losses.needs_teacher:
        return
    reading = config.losses.needing("final", "layers", "features", "attention")
    feeds = {key: fed(config, teacher) for key, teacher in config.taught.items()}
    for key, teacher in config.taught.items():
        for name in teacher.losses or ():
            if name not in reading:
                what = f"names {name}, which is no loss with a weight that reads a teacher"
                yield Broken(f"{key}.losses", what, f"use {', '.join(reading)}")
        if not feeds[key]:
            yield Broken(
                key, f"feeds none of the losses: {', '.join(reading)}", "take it out, or give such a loss a weight"
            )
        if len(feeds) == 1 and teacher.weight != 1:
            yield Broken(f"{key}.weight", "is ignored: there is no other teacher", "take it out")
        if len(feeds) > 1 and isinstance(teacher, TeacherRole) and teacher.train:
            what = "a teacher that is trained is the only one of its run"
            yield Broken(f"{key}.train", what, "set it to false, or name it alone: teacher")
    for name in reading if feeds else ():
        if not any(name in names for names in feeds.values()):
            yield Broken(
                f"losses.{name}.weight", "no teacher feeds it", "set it to 0, or name it in a teacher's losses"
            )
    tapped = config.losses.needing("attention")
    if sum(not names.isdisjoint(tapped) for names in feeds.values()) > 1:
        what = f"{', '.join(tapped)} would be fed by several, and attention is compared with one teacher's"
        yield Broken("teachers", what, "name the losses of each: leave it out of all but one")


def teachers_come_and_go(config: Run) -> Iterator[Broken]:
    """Every teacher teaches at some step of the run, and at every step there is something to learn."""
    spans, steps = {key: span_of(one) for key, one in config.taught.items()}, config.train.steps
    if not config.losses.needs_teacher or set(spans.values()) <= {Span()}:
        return
    for key, span in spans.items():
        for name, value in (("after", span.after + 1), ("until", span.until or 0)):
            if value > steps:
                what = f"{getattr(span, name)} is beyond the run's last step, train.steps: {steps}"
                yield Broken(f"{key}.{name}", what, "lower it, or raise train.steps")
        if span != Span() and getattr(config.taught[key], "train", False):
            name = "after" if span.after else "until"
            yield Broken(f"{key}.{name}", "is of a frozen teacher, and this one learns along", "take it out")
    if len(config.losses.needing(*GIFTS)) == len(config.losses.active):
        for first in phases(config):
            if not any(span.holds(first) for span in spans.values()):
                what = f"nothing teaches at step {first + 1}, and no loss does without a teacher"
                yield Broken("teachers", what, "close the gap between until of one and after of the next")
    for name in config.losses.needing("features") if config.mix.vectors == "concatenate" else ():
        own = {spans[key] for key, teacher in config.taught.items() if name in fed(config, teacher)}
        if len(own) > 1:
            what = f"concatenate: teachers of losses.{name} teach at different steps, and its width would change"
            yield Broken("mix.vectors", what, "set it to fold")


def mixtures_are_of_several(config: Run) -> Iterator[Broken]:
    """How teachers are put together is read where several feed a loss of that sort, at one step."""
    for name, usual, need, sort in (
        ("relevance", "weight", "final", "of final relevance"),
        ("vectors", "fold", "features", "of vectors"),
    ):
        set_to, losses = getattr(config.mix, name), config.losses.needing(need)
        if set_to != usual and not any(
            sum(loss in fed(config, one) for one in config.taught.values() if span_of(one).holds(step)) > 1
            for loss in losses
            for step in phases(config)
        ):
            yield Broken(
                f"mix.{name}", f"{set_to} is ignored: no loss {sort} is fed by several teachers", "take it out"
            )


def overlap_has_a_teacher_to_run_ahead(config: Run) -> Iterator[Broken]:
    """Only a frozen model's forward can be begun a window early."""
    frozen = config.cotrained is None and any(computes(teacher.kind) for teacher in config.taught.values())
    if config.train.overlap and not frozen:
        yield Broken(
            "train.overlap", "there is no frozen teacher that could run ahead of the student", "set it to false"
        )


def patience_has_evaluations(config: Run) -> Iterator[Broken]:
    """Patience counts evaluations during training."""
    if config.train.patience and config.evaluation.split is None:
        yield Broken("train.patience", "is never lost: evaluation.split is null", "name a split, or set patience to 0")
    elif config.train.patience and config.train.evaluate_every == 0:
        what = "is never lost: train.evaluate_every is 0, which evaluates at the end alone"
        yield Broken("train.patience", what, "set train.evaluate_every, or patience to 0")
    elif config.train.patience and config.train.evaluate_every >= config.train.steps:
        what = f"is never lost: of {config.train.steps} steps train.evaluate_every is {config.train.evaluate_every}"
        yield Broken("train.patience", what, "evaluate more often, or set patience to 0")


def candidates_are_reranked(config: Run) -> Iterator[Broken]:
    """A model of vectors searches the whole corpus; candidates are of those that rerank, a warmed-up teacher among them."""
    kinds = [config.student.kind, *(teacher.kind for teacher in config.taught.values())]
    if not all(map(gives_vectors, kinds)):
        return
    usual = type(config.evaluation).model_fields
    for name in ("run", "depth"):
        if getattr(config.evaluation, name) != usual[name].default:
            what = f"is ignored by a {config.student.kind}, which searches the whole corpus"
            yield Broken(f"evaluation.{name}", what, "take it out")


def one_engine_has_one_dtype(config: Run) -> Iterator[Broken]:
    """A teacher that is trained lives in the student's engine, in its dtype."""
    teacher = config.cotrained
    if teacher is not None and teacher.dtype not in ("auto", config.student.dtype):
        what = f"a teacher that is trained has the student's dtype, which is {config.student.dtype}"
        yield Broken(f"{next(iter(config.taught))}.dtype", what, f"set student.dtype: {teacher.dtype}, or take it out")


def a_students_scale_is_of_its_layers(config: Run) -> Iterator[Broken]:
    """A student's final relevance is what it will serve; its scale is that of its layers."""
    if config.student.scale != "none" and not config.losses.needing("layers"):
        what = f"{config.student.scale} is ignored: no loss reads its layers, and its final relevance is what it will serve"
        remedy = "take it out" + (
            "" if reads_pairs(config.student.kind) else "; student.normalize: true compares by cosine"
        )
        yield Broken("student.scale", what, remedy)


def averages_have_checkpoints(config: Run) -> Iterator[Broken]:
    """What is averaged must have been kept; weights are searched by an evaluation."""
    train = config.train
    if train.average is None:
        if train.average_by == "dev":
            yield Broken("train.average_by", "dev is ignored: nothing is averaged", "set train.average, or take it out")
        return
    if train.average > train.keep:
        what = f"{train.average} checkpoints are to be averaged, {train.keep} are kept"
        yield Broken("train.average", what, f"set train.keep: {train.average}")
    saved = -(-train.steps // train.save_every)
    if train.average > saved:
        what = f"{train.average} checkpoints are to be averaged, {train.steps} steps save {saved}"
        yield Broken("train.average", what, f"set train.save_every: {max(1, train.steps // train.average)}")
    if train.lora is not None:
        yield Broken("train.average", "averages whole weights, not low-rank updates", "set it to null, or train.lora")
    if train.average_by == "dev" and config.evaluation.split is None:
        yield Broken("train.average_by", "dev: evaluation.split is null", "name a split, or set it to last")


def lora_is_of_the_student(config: Run) -> Iterator[Broken]:
    """A teacher that learns along is trained whole."""
    if config.train.lora is not None and config.cotrained is not None:
        what = "is of the student alone, and the teacher that learns along would be trained whole"
        yield Broken("train.lora", what, "set it to null, or teacher.train: false")


RULES: tuple[Rule, ...] = (
    queries_alone_have_an_index,
    losses_have_a_teacher,
    labels_have_something_to_compare,
    pairs_have_something_to_compare,
    scope_is_one_that_pairs_have,
    templates_are_of_frozen_models,
    packed_rows_are_passes,
    maps_come_whole,
    informative_layers_stay_so,
    a_lens_has_one_state_to_read,
    a_lens_path_names_a_lens,
    a_lens_has_layers_to_read,
    sharding_is_of_a_sharded_teacher,
    several_teachers_share,
    teacher_gives_what_losses_read,
    teachers_come_and_go,
    mixtures_are_of_several,
    overlap_has_a_teacher_to_run_ahead,
    patience_has_evaluations,
    candidates_are_reranked,
    one_engine_has_one_dtype,
    a_students_scale_is_of_its_layers,
    averages_have_checkpoints,
    lora_is_of_the_student,
    widths_are_of_vectors,
    first_dimensions_are_of_what_is_read,
)
