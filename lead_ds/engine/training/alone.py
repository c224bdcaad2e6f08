"""What a run on texts alone cannot have."""

from __future__ import annotations

from lead_ds.config import Config
from lead_ds.config.facts import gives_vectors
from lead_ds.errors import InputError
from lead_ds.teachers.open import teacher_class


def refuse_what_needs_groups(config: Config) -> None:
    """Raise InputError for what texts alone cannot serve: there is no judgement, no negative, no text to compare with."""
    by_vectors = set(config.losses.needing("features")) - set(config.losses.needing("labels", "final", "attention"))
    for name in config.losses.needing("labels", "final", "layers", "attention"):
        if name in by_vectors:  # of layers, too: each text's own
            continue
        what = "compares a query with its passages, and texts alone have none"
        raise InputError(f"losses.{name}.weight", what, "set it to 0, or bring training groups")
    reading = {"student": gives_vectors(config.student.kind)}
    for key, settings in config.taught.items() if config.losses.needs_teacher else ():
        teacher = teacher_class(settings.kind)
        reading[key] = teacher.reads_alone and "features" in teacher.given(settings)
    for key in (key for key, reads in reading.items() if not reads):
        what = f"a {(config.taught.get(key) or config.student).kind} gives no vector of a text alone"
        raise InputError(f"{key}.kind", what, "name a dual_encoder, or bring training groups")
    if config.cotrained is not None:
        what = "texts alone teach a teacher nothing: losses of vectors leave it as it is"
        raise InputError(f"{next(iter(config.taught))}.train", what, "set it to false")
    if config.data.negatives:
        raise InputError("data.negatives", "is ignored: texts alone have no negatives", "set it to 0")
    if config.data.keep_identical:
        raise InputError("data.keep_identical", "is ignored: texts alone have no negatives", "take it out")
