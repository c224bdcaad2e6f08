"""Read and write the configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lead_ds.config.schema import Config
from lead_ds.io.files import atomic
from lead_ds.settings.documents import write_yaml
from lead_ds.settings.parse import load_tree, parse_section


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of the YAML file at `path`, with `section.key=value` overrides applied.

    Raises InputError naming the file and key for what is unreadable, unknown (with the nearest valid name) or out of range.
    """
    return parse_config(load_tree(path, overrides, Config), path)


def parse_config(tree: dict[str, Any], where: str | Path) -> Config:
    """The checked configuration of a plain tree; `where` names its source in errors."""
    return parse_section(Config, tree, where)


def save_config(config: Config, path: str | Path) -> None:
    """Write a run's resolved configuration as YAML; the pipeline that it may be a stage of is none of its concern."""
    tree = config.model_dump(mode="json", exclude={"pipeline"})
    with atomic(Path(path)) as temporary:  # a full disk must not leave an empty one, which would be taken for a run
        temporary.write_text(write_yaml(tree), "utf-8")
