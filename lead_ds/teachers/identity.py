"""What decides a teacher's output, and of which data: written beside everything made of it, compared before use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds.data.groups.group import Groups
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.tokenizer import tokenizer_checksum
from lead_ds.engine.distributed.agreement import summary
from lead_ds.io.files import checksum, model_checksum
from lead_ds.models.kinds.kind import KINDS
from lead_ds.relevance import Scale
from lead_ds.settings.meaning import keys_of
from lead_ds.settings.roles import Share, TeacherRole, Trained


def teacher_facts(teacher: TeacherRole, encoder: TextEncoder, seed: int) -> dict[str, Any]:
    """A teacher, and how it reads. `seed`: of a teacher of random weights."""
    return {
        "kind": teacher.kind,
        "checksum": model_checksum(teacher.path),
        "settings": deciding_settings(teacher),
        "tokenizer": tokenizer_checksum(encoder.tokenizer),
        "query_prompt": encoder.query_prompt,
        "passage_prompt": encoder.passage_prompt,
        "seed": seed if teacher.weights == "random" else None,
    }


def data_facts(groups: Groups) -> dict[str, Any]:
    """What decides the groups: checksums of their files, and their number."""
    sums = {name: checksum([path], lambda _: "") for name, path in groups.sources.items()}
    return {**sums, **groups.checksums, "groups": len(groups)}


def input_facts(groups: Groups, taught_by: dict[str, Path]) -> dict[str, str]:
    """The files that decide a run beside its configuration: the training groups and their texts, and the teacher's (see
    `Teacher.files`), by the names that they are reported by. By size and checksum; of large ones, of pieces of them."""
    files = {f"data: {name}": path for name, path in groups.sources.items()}
    found = {name: digest for name, path in (files | taught_by).items() if (digest := summary(path)) is not None}
    return {f"data: {name}": checksum for name, checksum in groups.checksums.items()} | found


def deciding_settings(teacher: TeacherRole) -> dict[str, Any]:
    """The settings that decide what a frozen teacher gives for a text; its kind stands beside them."""
    deciding = keys_of(teacher, "result") - {"kind", *Trained.model_fields, *Share.model_fields}
    return {name: value for name, value in teacher.model_dump(mode="json").items() if name in deciding}


def stored_scale(kind: str, scale: str) -> Scale:
    """In which scale relevance is stored: cosines as such; none and z-scores, which depend on the draw, as the model
    gives it.

    A model of pairs gives scores, which have no cosine.
    """
    return "cosine" if scale == "cosine" and not KINDS[kind].reads_pairs else "none"
