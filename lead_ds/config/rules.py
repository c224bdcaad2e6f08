"""Rules that bind several sections: each names the setting to change, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lead_ds.settings.roles import CachedRole, TeacherRole
from lead_ds.settings.run import Run


class Broken(NamedTuple):
    """A rule that a configuration breaks: at which dotted key, what is wrong, what to do."""

    key: str
    what: str
    remedy: str


Rule = Callable[[Run], Iterator[Broken]]


def broken(config: Run) -> Broken | None:
    """The first rule that a configuration breaks."""
    return next((found for rule in RULES for found in rule(config)), None)


def losses_have_a_teacher(config: Run) -> Iterator[Broken]:
    """A loss with a weight that reads a teacher needs one."""
    if config.losses.needs_teacher and config.teacher is None:
        readers = ", ".join(config.losses.needing("final", "layers", "features", "attention"))
        yield Broken(
            "teacher", f"a teacher section is missing: {readers} of losses read one", "name the model to learn from"
        )


def labels_have_something_to_compare(config: Run) -> Iterator[Broken]:
    """Within a query's own passages, labels say something only where there are negatives."""
    for name, loss in (("contrastive", config.losses.contrastive), ("focal", config.losses.focal)):
        in_group = reads_pairs(config.student.kind) or loss.scope == "group"
        if in_group and loss.weight > 0 and config.data.negatives == 0:
            what = f"is 0: the {name} loss of a model of pairs, and of scope: group, compares a query's own passages"
            yield Broken("data.negatives", what, "set it to 1 or more")


def pairs_have_something_to_compare(config: Run) -> Iterator[Broken]:
    """A model of pairs is compared over a query's own passages, and a distribution over one holds no information."""
    models = [config.student.kind, *([] if config.teacher is None else [config.teacher.kind])]
    if any(map(reads_pairs, models)) and config.losses.needs_teacher and config.data.negatives == 0:
        what = "is 0: a model that reads pairs is compared over a query's own passages, and there is but one"
        yield Broken("data.negatives", what, "set it to 1 or more")


def scope_is_one_that_pairs_have(config: Run) -> Iterator[Broken]:
    """A student that reads pairs has scores of a query's own passages alone: the batch's cannot be requested."""
    if not reads_pairs(config.student.kind):
        return
    kind = f"is ignored by a {config.student.kind}, which scores a query's own passages alone"
    for name, loss in (("contrastive", config.losses.contrastive), ("focal", config.losses.focal)):
        if loss.weight > 0 and loss.scope == "batch":
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
        "teacher.passes": getattr(config.teacher, "passes", None),
        "train.overlap": config.train.overlap or None,
    }
    for key, value in settings.items():
        if off and value is not None:
            yield Broken(key, "has no attention maps", f"set it to {'false' if value is True else 'null'}, or {off}")


def informative_layers_stay_so(config: Run) -> Iterator[Broken]:
    """Which layers are informative is measured once."""
    if getattr(config.teacher, "train", False) and config.losses.informative is not None:
        what = "the losses select informative layers, which are measured once, of a frozen teacher"
        yield Broken("teacher.train", what, "set it to false, or choose another select")


def a_lens_has_one_state_to_read(config: Run) -> Iterator[Broken]:
    """A tuned lens reads one state per text, or pair."""
    from lead_ds.models.kinds.kind import KINDS

    teacher = config.teacher
    if not isinstance(teacher, TeacherRole) or teacher.lens == "head" or teacher.kind not in KINDS:
        return
    if KINDS[teacher.kind].lens_form is None:
        what = f"tuned: a tuned lens reads one state per text, a {teacher.kind} has one per token"
        yield Broken("teacher.lens", what, "set it to head")


def a_lens_path_names_a_lens(config: Run) -> Iterator[Broken]:
    """A folder of a tuned lens is read where layers are read through one; of a cache, it says through which."""
    teacher = config.teacher
    if not isinstance(teacher, TeacherRole) or isinstance(teacher, CachedRole):
        return
    if teacher.lens == "head" and teacher.lens_path is not None:
        yield Broken("teacher.lens_path", "is ignored by lens: head", "set teacher.lens: tuned, or take it out")


def teacher_gives_what_losses_read(config: Run) -> Iterator[Broken]:
    """A teacher that is not a model of this run gives less than one that is."""
    from lead_ds.teachers.open import teacher_class

    if config.teacher is None:
        return
    gives = teacher_class(config.teacher.kind).gives
    named: dict[Any, str] = {
        "layers": "layers to read",
        "features": "vectors",
        "attention": "attention maps",
        "final": "scores",
    }
    for need, what in named.items():
        for name in config.losses.needing(need) if need not in gives else ():
            remedy = "set it to 0, or name the model itself with its kind"
            yield Broken(f"losses.{name}.weight", f"a teacher of kind {config.teacher.kind} has no {what}", remedy)


def overlap_has_a_teacher_to_run_ahead(config: Run) -> Iterator[Broken]:
    """Only a frozen model's forward can be begun a window early."""
    teacher = config.teacher
    frozen = isinstance(teacher, TeacherRole) and not teacher.train and computes(teacher.kind)
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


def candidates_are_reranked(config: Run) -> Iterator[Broken]:
    """A model of vectors searches the whole corpus; candidates are of those that rerank, a warmed-up teacher among them."""
    kinds = [config.student.kind, *([] if config.teacher is None else [config.teacher.kind])]
    if not all(map(gives_vectors, kinds)):
        return
    usual = type(config.evaluation).model_fields
    for name in ("run", "depth"):
        if getattr(config.evaluation, name) != usual[name].default:
            what = f"is ignored by a {config.student.kind}, which searches the whole corpus"
            yield Broken(f"evaluation.{name}", what, "take it out")


def one_engine_has_one_dtype(config: Run) -> Iterator[Broken]:
    """A teacher that is trained lives in the student's engine, in its dtype."""
    teacher = config.teacher
    if isinstance(teacher, TeacherRole) and teacher.train and teacher.dtype not in ("auto", config.student.dtype):
        what = f"a teacher that is trained has the student's dtype, which is {config.student.dtype}"
        yield Broken("teacher.dtype", what, f"set student.dtype: {teacher.dtype}, or take it out")


def lora_is_of_the_student(config: Run) -> Iterator[Broken]:
    """A teacher that learns along is trained whole."""
    if config.train.lora is not None and getattr(config.teacher, "train", False):
        what = "is of the student alone, and the teacher that learns along would be trained whole"
        yield Broken("train.lora", what, "set it to null, or teacher.train: false")


def widths_are_of_vectors(config: Run) -> Iterator[Broken]:
    """Only a vector has first dimensions."""
    if config.student.dims is not None and not gives_vectors(config.student.kind):
        yield Broken(
            "student.dims", f"is ignored by a {config.student.kind}, which gives no vector per text", "take it out"
        )


def first_dimensions_are_of_what_is_read(config: Run) -> Iterator[Broken]:
    """A model that is trained has all of its dimensions, and a tuned lens is fitted to them."""
    for key, model in trained(config):
        if getattr(model, "dim", None) is not None:
            remedy = "take it out; student.dims trains its first dimensions as well"
            yield Broken(f"{key}.dim", "is for a model that is read as it is, not for one that is trained", remedy)
    if getattr(config.teacher, "dim", None) is not None and getattr(config.teacher, "lens", "head") == "tuned":
        yield Broken("teacher.dim", "does not go with a tuned lens, which is fitted to whole vectors", "take it out")


RULES: tuple[Rule, ...] = (
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
    teacher_gives_what_losses_read,
    overlap_has_a_teacher_to_run_ahead,
    patience_has_evaluations,
    candidates_are_reranked,
    one_engine_has_one_dtype,
    lora_is_of_the_student,
    widths_are_of_vectors,
    first_dimensions_are_of_what_is_read,
)


def trained(config: Run) -> Iterator[tuple[str, TeacherRole]]:
    """The models that the run trains, by section."""
    yield "student", config.student  # type: ignore[misc]
    if isinstance(config.teacher, TeacherRole) and config.teacher.train:
        yield "teacher", config.teacher


def reads_pairs(kind: str) -> bool:
    """Whether models of a kind read a query and a passage as one text."""
    from lead_ds.models.kinds.kind import KINDS

    return kind in KINDS and KINDS[kind].reads_pairs


def gives_vectors(kind: str) -> bool:
    """Whether models of a kind give one vector per text."""
    from lead_ds.models.kinds.kind import KINDS

    return kind in KINDS and KINDS[kind].gives_vectors


def computes(kind: str) -> bool:
    """Whether a teacher of a kind runs a model."""
    from lead_ds.teachers.open import teacher_class

    return teacher_class(kind).computes
