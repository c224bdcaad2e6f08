"""Open training groups, whatever their format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds.data.groups.alone import TextsAlone, holds_texts_alone
from lead_ds.data.groups.by_id import IdGroups
from lead_ds.data.groups.by_text import TextGroups
from lead_ds.data.groups.formats import form_of
from lead_ds.data.groups.group import Groups
from lead_ds.data.groups.mixture import MixedGroups
from lead_ds.errors import InputError
from lead_ds.io.jsonl import read_jsonl, require_file
from lead_ds.settings.data import DataConfig


def open_groups(config: DataConfig) -> Groups:
    """The training groups of a configuration, checked: every id has a text, every group a positive.

    Raises InputError naming file and line for a group that cannot be used, and for too few passages to draw negatives from.
    """
    if not config.sets:
        return open_set(config)
    groups = [open_set(part) for part in config.by_name.values()]
    return MixedGroups(config.sets, groups, alpha=config.alpha, apart=config.batches == "apart")


def open_set(config: DataConfig) -> Groups:
    """The groups, or texts alone, of one folder. Raises as `open_groups`."""
    folder = Path(config.path)
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "data.path is the folder of the training data")
    path = folder / config.train
    if not (config.format == "texts" and path.is_dir()):
        path = require_file(path, "data.train names the training groups, relative to data.path")
    path = path.absolute()
    if config.format == "texts" and holds_texts_alone(path):
        return TextsAlone.open(config, path)
    if config.role is not None:
        raise InputError("data.role", f"is ignored: {path.name} holds groups, not texts alone", "take it out")
    form = config.format if config.format != "auto" else recognise(path)
    if form in ("canonical", "qrels"):
        return IdGroups.open(config, path, form)
    return TextGroups.open(config, path, form)


def recognise(path: Path) -> str:
    """The format of a training file, by its name and first record. Raises InputError when it is not a known one."""
    if path.name.removesuffix(".gz").endswith(".tsv"):
        return "qrels"
    first: tuple[int, dict[str, Any]] | None = next(read_jsonl(path), None)
    if first is None:
        raise InputError(path, "holds no groups", 'each line is {"query_id", "positives", "negatives"}')
    number, record = first
    if "query_id" in record and "positives" in record:
        return "canonical"
    form = form_of(record)
    if form is not None:
        return form
    raise InputError(
        f"{path}:{number}",
        f"no known format of training groups has the fields {', '.join(map(repr, record)) or 'of an empty object'}",
        'each line is {"query_id", "positives", "negatives"}; see data.format for others',
    )
