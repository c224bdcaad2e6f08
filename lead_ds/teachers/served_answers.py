"""Every answer of a server, on disk as soon as it comes: what was asked once is never asked again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.errors import InputError, RunError
from lead_ds.io.facts import differing
from lead_ds.io.json_text import parse_json
from lead_ds.io.waiting import told_while_waiting
from lead_ds.teachers.served_client import Questions

FILE = "answers.sqlite"
_WAIT = 120.0  # seconds for another process to finish writing
_AT_ONCE = 500


class Answers:
    """The answers of one model, in a folder. Several processes may add to it; each answer is written whole or not at all."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    def begin(self) -> None:
        """Make the folder. Raises InputError where it holds another model's answers, RunError where it cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(self.folder, f"cannot be made: {error}", "set teacher.answers to another folder") from None
        with self._open() as store:
            store.execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, answer BLOB) WITHOUT ROWID")
            store.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")
            store.execute("INSERT OR IGNORE INTO facts VALUES ('model', ?)", [json.dumps(self.facts)])
            held = parse_json(store.execute("SELECT value FROM facts WHERE name = 'model'").fetchone()[0])
        if changed := differing(held, self.facts):
            what = f"holds answers of another {', '.join(changed)}"
            raise InputError(self.folder, what, "set teacher.answers to another folder")

    def read(self, questions: Questions) -> dict[tuple[str, ...], np.ndarray]:
        """The answers that are there, float32."""
        keys = {_key(question): question for question in questions}
        found: dict[tuple[str, ...], np.ndarray] = {}
        names = list(keys)
        with self._open() as store:
            for first in range(0, len(names), _AT_ONCE):
                some = names[first : first + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = store.execute(f"SELECT question, answer FROM answers WHERE question IN ({marks})", some)
                found |= {keys[name]: np.frombuffer(answer, "<f4") for name, answer in rows}
        return found

    def keep(self, questions: Questions, answers: np.ndarray) -> None:
        """Add answers; of what another process has answered meanwhile, that answer stays.

        Raises RunError for vectors of another width than those that are there.
        """
        rows = [
            (_key(question), np.ascontiguousarray(answer, "<f4").tobytes())
            for question, answer in zip(questions, answers, strict=True)
        ]
        with self._open() as store:
            store.execute("INSERT OR IGNORE INTO facts VALUES ('bytes', ?)", [str(len(rows[0][1]))])
            held = int(store.execute("SELECT value FROM facts WHERE name = 'bytes'").fetchone()[0])
            if held != len(rows[0][1]):
                what = f"the server gives vectors {len(rows[0][1]) // 4} wide, and gave {held // 4} before"
                raise RunError(self.folder, what, "see which model it serves; answers of another need another folder")
            store.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)

    def __len__(self) -> int:
        with self._open() as store:
            return int(store.execute("SELECT count(*) FROM answers").fetchone()[0])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction. A connection of its own each time: none is carried into a forked process or another thread."""
        file = self.folder / FILE
        try:
            store = sqlite3.connect(file, timeout=_WAIT)
            try:
                with (
                    told_while_waiting(lambda: f"{file}, which another process may be writing to: end it if it hangs"),
                    store,
                ):
                    yield store
            finally:
                store.close()
        except (sqlite3.Error, OSError) as error:
            remedy = "make room, or set teacher.answers to another folder"
            raise RunError(file, f"cannot be read or written: {error}", remedy) from None


def _key(question: Sequence[str]) -> bytes:
    text = json.dumps(list(question), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def folder_of(settings: Any, cache: Path, digest: str) -> Path:
    """Where answers are kept: `answers`, else a folder of the model's name in the cache folder."""
    if settings.answers is not None:
        return Path(settings.answers)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in (settings.model or settings.api))
    return cache / "served" / f"{name[-60:]}-{digest}"
