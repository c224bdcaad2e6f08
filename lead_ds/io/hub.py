"""The hub: whether it answers, one file of a repository, or all that a model is loaded from."""

from __future__ import annotations

import functools
from pathlib import Path

from lead_ds.errors import InputError

# What is never read of a repository: the same weights in other formats.
_OTHERS = ("*.onnx*", "*.gguf", "*.h5", "*.msgpack", "*.ot", "onnx/*", "openvino/*", "original/*", "*.pth")


@functools.cache
def _hub_answers() -> bool:
    """One quick try: every file requested of a hub that is away would be retried for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # whatever the HTTP library of the day raises
        return False
    return True


def hub_settings(path: str) -> dict[str, bool]:
    """Arguments for transformers' loaders: the local cache alone where `path` is a directory or the hub is away."""
    return {"local_files_only": Path(path).expanduser().is_dir() or not _hub_answers()}


def hub_file(path: str, name: str) -> Path | None:
    """A file of a hub repository; None where it is absent or the hub cannot be reached."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            path,
            name,
            **hub_settings(path),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


@functools.cache
def hub_folder(path: str, revision: str | None) -> Path:
    """The local folder of a hub repository, downloaded where it has to be. Raises InputError where it is not to be had.

    Weights that come as pickle are left out where there are others.
    """
    from huggingface_hub import snapshot_download

    safe = any(hub_file(path, name) for name in ("model.safetensors", "model.safetensors.index.json"))
    ignored, alone = [*_OTHERS, *(["*.bin"] if safe else [])], hub_settings(path)["local_files_only"]
    try:
        return Path(snapshot_download(path, revision=revision, ignore_patterns=ignored, local_files_only=alone))
    except Exception as error:  # whatever the HTTP library of the day raises
        raise InputError(path, "was not found on the hub", "check the name and the network") from error
