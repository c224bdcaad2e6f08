"""A model that the pipeline searches with, and the settings that its commands read it by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lead_ds.models.kinds.kind import KINDS
from lead_ds.settings.documents import in_yaml

# Of training alone, its lengths among them: what is searched is read as far as the model's files say.
_OF_RUNS = {"kind", "path", "weights", "passes", "scale", "query_length", "passage_length", "max_length"}


@dataclass(frozen=True)
class Ready:
    """A model that is searched with: its path, the stage that makes it, and what decides of it where none does.

    settings: of one that comes as it is, what its section says of how it is read.
    """

    path: str
    needs: list[str]
    inputs: dict[str, str]
    models: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def asking(self, documents: Ready | None) -> list[str]:
        """Arguments of `search` for this model's queries; documents: the model that made the index, where that is another."""
        if documents is None:
            return ["--model", self.path, *(word for setting in self.settings for word in ("--set", setting))]
        own = [word for setting in self.settings for word in ("--set", f"query.{setting}")]
        return ["--query-model", self.path, "--document-model", documents.path, *own]


def reading_settings(section: Any) -> tuple[str, ...]:
    """What a section of a model says of how it is read, as commands over the model take that."""
    names = set(KINDS[section.kind].Settings.model_fields) - _OF_RUNS
    given = section.model_dump(include=names, exclude_defaults=True)
    return (f"kind={section.kind}", *(f"{name}={in_yaml(value)}" for name, value in given.items())) if given else ()
