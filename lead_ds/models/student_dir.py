"""Saving a student so that sentence-transformers loads it: whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError, RunError
from lead_ds.io.files import sync, write_errors
from lead_ds.models.card import plain_card
from lead_ds.models.files import RECORD
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.own import OwnEncoder


def save_student(
    scorer: Kind,
    encoder: TextEncoder,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    card: str | None = None,
) -> Path:
    """Write a student's directory, whole or not at all, and return it.

    The class of sentence-transformers that its kind names loads it and gives the same vectors or scores. `state_dict`: of the
    scorer, where its own parameters are sharded. `card`: the text of README.md. An existing directory is replaced only when
    all is written. Raises TypeError for a kind that is no student's.
    """
    if not scorer.can_be_student:
        raise TypeError(f"a {scorer.name} is not a student")
    with whole_folder(Path(folder)) as made:
        own = scorer.card() if isinstance(scorer, OwnEncoder) else None
        write_student(scorer, encoder, made, state_dict or scorer.state_dict(), own or card)
    return Path(folder)


def write_student(scorer: Kind, encoder: TextEncoder, folder: Path, state: dict[str, Tensor], card: str | None) -> None:
    """Fill a student's directory; arguments as `save_student`."""
    record = scorer.save(folder, encoder, state)
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card or plain_card(scorer, encoder), encoding="utf-8")


def vacant(out: str | Path) -> Path:
    """A folder that may be written to. Raises InputError where it holds something, or a file is in the way."""
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(out, "is there already", "choose another folder, or delete it")
    nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise InputError(out, f"cannot be made: {nearest} is a file", "choose another folder")
    return out


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes `folder`'s place when the block ends well; else nothing of it is left.

    Raises RunError when it cannot be written."""
    made = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield made
        made.chmod(0o755)  # mkdtemp's is private
        for path in (*made.rglob("*"), made):
            sync(path)
        _put(made, folder)
    except write_errors() as error:
        raise RunError(folder, f"cannot be written: {error}", "check the folder and the free space") from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _put(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`; what stood there is moved aside first, and back again if that fails."""
    if not folder.exists():
        os.replace(made, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.replace(folder, aside / "old")
    try:
        os.replace(made, folder)
    except OSError:
        os.replace(aside / "old", folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
