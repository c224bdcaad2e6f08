"""Rules of models whose vectors are read in part, or searched in another model's index."""

from __future__ import annotations

from collections.abc import Iterator

from lead_ds.config.broken import Broken
from lead_ds.config.facts import gives_vectors, is_sparse, span_of, trained
from lead_ds.settings.roles import Span
from lead_ds.settings.run import Run


def widths_are_of_vectors(config: Run) -> Iterator[Broken]:
    """Only a vector has first dimensions, and one of the vocabulary's weights has none that come first."""
    kind = config.student.kind
    if is_sparse(kind):
        why = "whose vectors are sparse"
    elif not gives_vectors(kind):
        why = "which gives no vector per text"
    else:
        return
    for name in ("quantize", "dims"):
        if getattr(config.student, name) is not None:
            yield Broken(f"student.{name}", f"is ignored by a {kind}, {why}", "take it out")


def first_dimensions_are_of_what_is_read(config: Run) -> Iterator[Broken]:
    """A model that is trained has all of its dimensions, and a tuned lens is fitted to them."""
    for key, model in trained(config):
        if getattr(model, "dim", None) is not None:
            remedy = "take it out; student.dims trains its first dimensions as well"
            yield Broken(f"{key}.dim", "is for a model that is read as it is, not for one that is trained", remedy)
    if getattr(config.teacher, "dim", None) is not None and getattr(config.teacher, "lens", "head") == "tuned":
        yield Broken("teacher.dim", "does not go with a tuned lens, which is fitted to whole vectors", "take it out")


def queries_alone_have_an_index(config: Run) -> Iterator[Broken]:
    """A student whose passages are a teacher's has one, which stays as it is, and has queries alone to learn by."""
    key, kind = "student.passages", config.student.kind
    if getattr(config.student, "passages", "own") == "own":
        return
    if not gives_vectors(kind) or is_sparse(kind):
        yield Broken(key, f"teacher: a {kind} gives no vectors that a teacher's index holds", "set it to own")
    if len(config.taught) != 1 or config.cotrained is not None:
        yield Broken(
            key, "teacher: needs one teacher, which is not trained: its index stays", "name one, or set it to own"
        )
    if not config.losses.needs_teacher:
        yield Broken(key, "teacher: no loss reads the teacher, so it gives nothing", "give losses.response a weight")
    if any(span_of(one) != Span() for one in config.taught.values()):
        yield Broken(key, "teacher: its passages are needed at every step", "take after and until out of the teacher")
    if config.data.format == "texts":
        yield Broken(key, "teacher: texts alone have no passages", "set it to own, and losses.embedding.of: [queries]")
    for name in config.losses.needing("layers", "attention"):
        yield Broken(f"losses.{name}.weight", "reads passages, and the student reads queries alone", "set it to 0")
    for name, (_, section) in config.losses.active.items():
        of = getattr(section, "of", [])
        if others := [texts for texts in of if texts not in ("queries", "query_query", "query_passage")]:
            what = f"names {', '.join(others)}, which are the teacher's own: student.passages is teacher"
            yield Broken(f"losses.{name}.of", what, "take it out")
    if config.evaluation.split is not None:
        what = "would search an index of the student's own, and student.passages is teacher"
        remedy = "set it to null, and evaluate afterwards: --query-model STUDENT --document-model TEACHER"
        yield Broken("evaluation.split", what, remedy)
