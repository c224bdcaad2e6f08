"""Where the files of a model are: its own folder or repository, or the merged copy of an adapter and its base.

A copy begins with the files that say how the model is read, of the adapter and of its base. Its weights are merged
when it is first loaded: `lead_ds.models.merging`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lead_ds.errors import RunError
from lead_ds.io.adapters import WEIGHTS, Adapter, adapter_of
from lead_ds.io.fingerprints import Fingerprints, digest
from lead_ds.io.hub import hub_file
from lead_ds.io.json_text import parse_json
from lead_ds.io.mapped import cache_dir, locked, signature

_PLAIN = (".json", ".jsonl", ".txt", ".model", ".py", ".jinja", ".tiktoken", ".metadata", ".md")
_WHOLE = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "lead_ds.json", "README.md")
_TOKENIZER = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
)

_found: dict[tuple[str, str], str] = {}


def find_file(path: str, name: str) -> Path | None:
    """A file of a local directory or a hub repository; None where it is absent or the hub cannot be reached."""
    path = located(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    return hub_file(path, name)


def located(path: str) -> str:
    """`path` itself, or of an adapter the folder of its merged copy, whose name has a checksum of adapter and base.

    Raises InputError as `adapter_of`; RunError where the cache folder cannot be written.
    """
    adapter = adapter_of(path)
    if adapter is None:
        return path
    now = [signature(adapter.place / name) for name in os.listdir(adapter.place) if name in WEIGHTS]
    known = (str(adapter.place.absolute()), json.dumps([adapter.settings, str(adapter.base), now]))
    if known not in _found:
        _found[known] = str(_copy(adapter))
    return _found[known]


def _copy(adapter: Adapter) -> Path:
    """The folder of a merged copy, with all but its weights."""
    home = cache_dir() / "adapters"
    base = adapter.base if adapter.base == adapter.folder else Path(located(str(adapter.base)))  # before the lock
    with locked(home / "files"):
        sums = Fingerprints(home / "checksums.json")
        key = digest({"adapter": sums.model(str(adapter.folder)), "base": sums.model(str(adapter.base))})
        sums.save()
        folder = home / f"{adapter.folder.absolute().name}-{key}"
        if folder.is_dir():
            return folder
        try:
            home.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=home))
            try:
                _fill(adapter, base, made)
                made.chmod(0o755)
                os.replace(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as error:
            raise RunError(home, f"cannot be written: {error}", "set LEAD_DS_CACHE to another folder") from None
    return folder


def _fill(adapter: Adapter, base: Path, made: Path) -> None:
    """The base's files, then the adapter's over them. Modules are those of the adapter's modules.json, else the base's."""
    own = _names(adapter.place)
    modules = adapter.folder if (adapter.folder / "modules.json").is_file() else base
    trees = _modules(modules)
    at, base_at = (trees[0] if trees else ""), next(iter(_modules(base)), "")
    replaced = _WHOLE if modules is not base else ("README.md",)
    words = any(name.startswith(_TOKENIZER) for name in own)  # never half of one tokenizer and half of another
    for name in _names(base / base_at):
        if name not in replaced and not (words and name.startswith(_TOKENIZER)):
            _put(base / base_at / name, made / at / name)
    if modules is base and base_at:
        for name in _names(base):
            _put(base / name, made / name)
    for name in own:
        if name != "config.json" or adapter.place == base:  # the base's weights are as the base's says
            _put(adapter.place / name, made / at / name)
    if adapter.at:
        for name in _names(adapter.folder):
            _put(adapter.folder / name, made / name)
    for tree in trees[1:]:
        if tree and (modules / tree).is_dir():
            shutil.copytree(modules / tree, made / tree, dirs_exist_ok=True)
    config = made / at / "config.json"
    if config.is_file():
        shape = parse_json(config.read_text("utf-8"))
        trained_on = architecture(adapter.settings, shape)
        if trained_on is not None:
            config.write_text(json.dumps(shape | {"architectures": [trained_on]}, indent=2) + "\n", "utf-8")


def architecture(settings: dict[str, Any], shape: dict[str, Any]) -> str | None:
    """The class of transformers that an adapter was trained on, by its settings; None where that is the base's own."""
    from transformers.models.auto import modeling_auto as auto

    task = settings.get("task_type")
    names: dict[str, Any] = {
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
    }
    said = (settings.get("auto_mapping") or {}).get("base_model_class")
    kind = shape.get("model_type")
    if task in names:
        found = names[task].get(kind)
        return found if isinstance(found, str) else None
    names["encoder"] = auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    return said if any(said == one.get(kind) for one in names.values()) else None


def _modules(folder: Path) -> list[str]:
    """The folders of a model's modules; none where sentence-transformers did not save it."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        found = [str(module.get("path", "")) for module in parse_json(file.read_text("utf-8"))]
    except (ValueError, AttributeError, TypeError):
        return []  # whoever reads it reports it
    return [name for name in found if ".." not in Path(name).parts and not Path(name).is_absolute()]


def _names(folder: Path) -> list[str]:
    """The files of a folder that are no weights, an adapter's settings left out."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix in _PLAIN)
    return [name for name in names if name != "adapter_config.json" and not name.endswith(".index.json")]


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
