"""Adapters as peft writes them: what is trained on top of a base model, which is elsewhere."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError
from lead_ds.io.hub import hub_file, hub_folder
from lead_ds.io.json_text import parse_json

SETTINGS = "adapter_config.json"
LONGEST = 250  # characters of the name of a module's folder
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """An adapter's local folder, where in it its files are, what they say, and the base model's local folder."""

    folder: Path
    at: str
    settings: dict[str, Any]
    base: Path

    @property
    def place(self) -> Path:
        """Where adapter_config.json is."""
        return self.folder / self.at

    @property
    def weights(self) -> Path:
        """The file of its weights. Raises InputError where there is none."""
        found = next((self.place / name for name in WEIGHTS if (self.place / name).is_file()), None)
        if found is None:
            raise InputError(self.place, f"holds {SETTINGS} and no {WEIGHTS[0]}", "copy the adapter's weights there")
        return found


def adapter_of(path: str) -> Adapter | None:
    """The adapter that a directory or hub repository holds; None where it holds none.

    Its base is the directory itself where base weights stand beside it, as transformers reads it. Else it is what
    base_model_name_or_path names: a folder from here, a folder from the adapter's, or a model of the hub.
    Raises InputError for a base that is missing, and for an adapter_config.json that cannot be read.
    """
    folder = Path(path).expanduser()
    local = folder.is_dir()
    if not local:
        if not path or not _on_hub(path):
            return None
        folder = hub_folder(path, None)
    at = _transformer(folder)
    if not (folder / at / SETTINGS).is_file():
        at = ""
    file = folder / at / SETTINGS
    if not file.is_file():
        return None
    settings = _object(file)
    if local and _has_weights(folder / at):
        return Adapter(folder, at, settings, folder)
    return Adapter(folder, at, settings, _base(file, settings, local))


def _base(file: Path, settings: dict[str, Any], local: bool) -> Path:
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(file, "names no base model", "set base_model_name_or_path to the base's folder or hub name")
    places = [Path(name).expanduser()]
    if local and not places[0].is_absolute():
        places.append(file.parent / name)
    found = [place for place in places if _is_model(place) and not place.samefile(file.parent)]
    if len(found) == 2 and not found[0].samefile(found[1]):
        what = f"its base {name} is one folder from here and another one from the adapter's"
        raise InputError(file, what, "set base_model_name_or_path to an absolute path")
    if found:
        return found[0]
    if places[0].is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(file, f"its base model {name} is not there", "set base_model_name_or_path to where it is")
    try:
        return hub_folder(name, settings.get("revision"))
    except InputError as error:
        what = f"its base model {name} is no folder here, and {error.what}"
        raise InputError(file, what, "set base_model_name_or_path to where it is") from None


def _transformer(folder: Path) -> str:
    """The folder of the first module, where sentence-transformers saved it."""
    try:
        found = parse_json((folder / "modules.json").read_text("utf-8"))[0]["path"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    # What is none of its folders is refused where modules.json is read.
    if not isinstance(found, str) or len(found) > LONGEST or ".." in Path(found).parts or Path(found).is_absolute():
        return ""
    return found


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "modules.json", SETTINGS))


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds a base model: its configuration, and weights that are not an adapter's."""
    names = ("model*.safetensors", "pytorch_model*.bin")
    return (folder / "config.json").is_file() and any(next(folder.glob(name), None) for name in names)


def _object(file: Path) -> dict[str, Any]:
    try:
        tree = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, f"not readable as JSON: {error}", "restore the adapter's file") from None
    if not isinstance(tree, dict):
        raise InputError(file, "not a JSON object", "restore the adapter's file")
    return tree


@functools.cache
def _on_hub(name: str) -> bool:
    return hub_file(name, SETTINGS) is not None
