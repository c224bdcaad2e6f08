"""Files of a model, wherever it is: a local directory, the local cache of the hub, or the hub."""

from __future__ import annotations

import functools
from pathlib import Path


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


def find_file(path: str, name: str) -> Path | None:
    """A file of a local directory or a hub repository; None where it is absent or the hub cannot be reached."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
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
