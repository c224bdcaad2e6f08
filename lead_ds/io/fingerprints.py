"""What files and models are, by their content; read again only where a file's size or time of change is another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lead_ds.errors import RunError
from lead_ds.io.files import checksum, model_files, write_json
from lead_ds.io.json_text import parse_json

ABSENT = "absent"


class Fingerprints:
    """Checksums of files, remembered in one file."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        try:
            known = parse_json(memory.read_text("utf-8"))
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass  # what is not remembered is read
        self._changed = False

    def file(self, path: Path) -> str:
        """A checksum of the content of `path`; ABSENT where there is no such file."""
        try:
            status = path.stat()
        except (OSError, ValueError):  # or no name that a file can have
            return ABSENT
        now = [status.st_size, status.st_mtime_ns]
        name = str(path.absolute())
        known = self._known.get(name)
        if known is None or known[:2] != now:
            known = self._known[name] = [*now, checksum([path], lambda _: "")]
            self._changed = True
        return str(known[2])

    def model(self, path: str) -> str:
        """A checksum of a model's directory; the name of one on the hub."""
        folder = Path(path)
        if not folder.is_dir():
            return f"hub {path}"
        return digest({name: self.file(file) for name, file in model_files(folder).items()})

    def save(self) -> None:
        """Remember for the next time; a folder that cannot be written to is read again then."""
        if self._changed:
            try:
                write_json(self._memory, self._known)
            except RunError:
                return
            self._changed = False


def digest(tree: Mapping[str, Any] | Iterable[Any]) -> str:
    """A hash of a plain tree."""
    text = json.dumps(tree, sort_keys=True, ensure_ascii=False)
    # A tree may come from a damaged file, and hold half a character, such as \ud800: it has a hash as well.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
