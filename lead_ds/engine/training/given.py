"""What a run is given as Python objects: the parts of it that no configuration file can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.data.groups.group import Groups
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.callbacks import Callback
from lead_ds.errors import InputError
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.load import load_student, load_text
from lead_ds.models.own import SHAPE, OwnEncoder, OwnText, checksum_of, copied


@dataclass(frozen=True)
class Given:
    """Objects of a run in place of what its configuration names.

    groups: of training. student, and teachers by key: modules. callbacks: called as the run goes on.
    accepted: names of inputs that may have changed since the last checkpoint.
    """

    groups: Groups | None = None
    student: nn.Module | None = None
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    accepted: Sequence[str] = ()

    def student_text(self, config: StudentConfig) -> TextEncoder:
        """How the student reads text."""
        return load_text(config) if self.student is None else _text(self.student, config.path)

    def teacher_text(self, key: str, config: TeacherConfig) -> TextEncoder | None:
        """How a teacher that was given reads text; None where its section names it."""
        module = self.teachers.get(key)
        return None if module is None else _text(module, config.path, checksum_of(module))

    def load_student(self, config: StudentConfig, dtype: torch.dtype) -> Kind:
        """The student, a module's in a copy of it."""
        if self.student is None:
            return load_student(config, dtype)
        return OwnEncoder(copied(self.student).to(dtype), config, student=True).train()


def _text(module: nn.Module, path: str, weights: str | None = None) -> Any:
    tokenize = getattr(module, "tokenize", None)
    if not callable(tokenize):
        raise InputError(type(module).__name__, "has no tokenize", SHAPE)
    return OwnText(path, tokenize, weights)


NOTHING = Given()


def check_given(groups: Groups, given: Given, ranks: Ranks) -> None:
    """Refuse ranks that were given different objects: they would train on different data, or wait for each other."""
    names = [type(callback).__name__ for callback in given.callbacks]
    facts = ranks.all({"data": groups.checksums, "callbacks": names, "--accept-changed": [*given.accepted]})
    for rank, other in enumerate(facts):
        for name in other:
            if other[name] != facts[0][name]:
                raise InputError(name, f"rank {rank} was given others than rank 0", "give every rank the same")
