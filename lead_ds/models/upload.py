"""Uploading a model's directory to the Hugging Face hub: what belongs to the model, and nothing else."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lead_ds.errors import InputError, RunError

# A list of what goes, not of what stays: a folder may hold checkpoints, logs, data, pickles and notes beside the model.
MODEL_FILES = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
    "lead_ds.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class Upload:
    """What would be uploaded where. files: path in the repository -> bytes. left: files of the folder that stay here."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]
    left: list[str]
    licence: str | None  # as the card's header has it

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())


def plan_upload(folder: str | Path, repo: str, *, private: bool = True) -> Upload:
    """List what an upload would send; asks nobody.

    Only a model's own files are taken, from the folder itself, from its modules' folders (1_Pooling, 2_Dense, ...) and from
    onnx/. Raises InputError for a folder that holds no finished model, a card that cannot be read, and an unfit name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(folder, "no such folder", "give a student's directory, such as runs/x/student")
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        hint = "its model is in student/" if (folder / "student").is_dir() else "give a student's directory"
        raise InputError(folder, "holds no model: it has no config.json", hint)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError("--repo", str(error).split(":")[0], "a name such as owner/model") from None
    if "/" not in repo:
        raise InputError("--repo", f"{repo!r} names no owner", "a name such as owner/model")
    files, left = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        inside = len(name.parts) == 1 or (len(name.parts) == 2 and _is_module(name.parts[0]))
        if inside and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in MODEL_FILES):
            files[name.as_posix()] = path.stat().st_size
        else:
            left.append(name.as_posix())
    if not any(name.endswith((".safetensors", ".onnx")) for name in files):
        raise InputError(folder, "holds no weights to upload", "safetensors and ONNX are uploaded, pickles never")
    return Upload(folder, repo, private, files, left, _licence(folder / "README.md"))


def upload(planned: Upload, api: Any = None) -> str:
    """Send it, as one commit; returns the address. api: huggingface_hub's HfApi, with the login that it finds.

    A repository that is there already keeps its visibility. Raises RunError when the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = api or HfApi()
    added = [CommitOperationAdd(name, str(planned.folder / name)) for name in planned.files]
    try:
        address = api.create_repo(planned.repo, private=planned.private, repo_type="model", exist_ok=True)
        api.create_commit(planned.repo, added, commit_message="Upload a model with lead-ds", repo_type="model")
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors are OSErrors, its login's ValueErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            planned.repo, f"cannot be uploaded: {reason[:200]}", "hf auth login; check name and network"
        ) from None
    return str(address)


def _is_module(folder: str) -> bool:
    return folder == "onnx" or folder[0].isdigit()


def _licence(card: Path) -> str | None:
    if not card.is_file():
        return None
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(card, f"cannot be read: {error}", "it must be Markdown in UTF-8") from None
    if not text.startswith("---\n"):
        return None
    try:
        header = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError as error:
        what = f"its header is not YAML: {str(error).splitlines()[0]}"
        raise InputError(card, what, "the hub would refuse it") from None
    licence = header.get("license") if isinstance(header, dict) else None
    return str(licence) if licence else None
