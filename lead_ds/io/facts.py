"""Facts: plain trees of what something was made of, written beside it and compared before it is used or added to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError

ANOTHER_FOLDER = "delete it, or choose another folder with --out"


def flat(tree: Any, at: str = "", free: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, and lists of them, by dotted key; without the keys of `free` and what is in them."""
    if at in free:
        return
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{at}.{key}" if at else str(key), free)
    else:
        yield at, tree


def differing(old: Any, new: Any) -> list[str]:
    """The dotted keys in which two sets of facts differ."""
    one, other = dict(flat(old)), dict(flat(new))
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def check_facts(folder: Path, holds: str, old: Any, new: Any, remedy: str = ANOTHER_FOLDER) -> None:
    """Raise InputError where what `folder` holds was made of other facts than it would be now, with the keys that differ."""
    if changed := differing(old, new):
        raise InputError(folder, f"{holds} of another {', '.join(changed)}", remedy)


def digest(facts: Any) -> str:
    """A checksum of a plain tree."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
