"""A folder that holds an index: what it was made of, and which queries belong to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.errors import InputError
from lead_ds.io.files import check_written, read_json
from lead_ds.io.fingerprints import digest
from lead_ds.io.notes import say_once
from lead_ds.io.shards import MANIFEST
from lead_ds.retrieval.encode import Side
from lead_ds.retrieval.small import SMALL
from lead_ds.retrieval.vectors import SPARSE, Vectors, check_facts

META, RESCORE = "index.json", "rescore"
AGAIN = "delete the folder, and build the index again"


def read_meta(folder: Path) -> dict[str, Any]:
    """What index.json says of the index in `folder`. Raises InputError where it is not what `build_index` writes."""
    meta = read_json(folder / META, "make it with lead-ds index")
    sizes = ("dimension", "count", *(("shard_rows",) if meta.get("dtype") == SPARSE else ()))
    check_facts(folder / META, meta, sizes, AGAIN)
    return meta


class Indexed(ABC):
    """An index of `build_index`, loaded for search."""

    def __init__(self, folder: Path, meta: dict[str, Any], ids: Sequence[str]) -> None:
        self.folder, self.meta, self.ids = folder, meta, ids

    @abstractmethod
    def search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [Q, k] and rows int64 [Q, k], best first; row -1 where fewer are found. Raises InputError."""

    def __len__(self) -> int:
        return len(self.ids)

    def check_model(self, model: dict[str, Any]) -> None:
        """Raise InputError unless queries of this model (see `model_facts`) live in the same space as the index."""
        made = self.meta["model"]
        changed = [key for key in (made | model) if made.get(key) != model.get(key)]
        if changed:
            differences = ", ".join(f"{key} {made.get(key)}, here {model.get(key)}" for key in changed)
            raise InputError(
                self.folder, f"was made by another model: {differences}", "use that model, or build it again"
            )

    def check_two(self, query: dict[str, Any], document: str) -> None:
        """Raise InputError unless the model with the checksum `document` made the index, as wide as the queries' vectors."""
        if self.meta["model"].get("checksum") != document:
            raise InputError(self.folder, "was made by another document model", "use that one, or build it again")
        if query["dimension"] != self.meta["dimension"]:
            what = f"holds vectors of {self.meta['dimension']} dimensions, the query model gives {query['dimension']}"
            raise InputError(self.folder, what, "use a model of that width")

    def check_side(self, side: Side) -> None:
        """Raise InputError when the model now reads such texts with another prompt than the index was made with."""
        if side.kind == self.meta["kind"] and side.prompt != self.meta["prompt"]:
            what = f"was made with the prompt {self.meta['prompt']!r}, the model now has {side.prompt!r}"
            raise InputError(self.folder, what, "use the model as it was, or encode and index again")


def facts_of(vectors: Vectors, factory: str, queries: dict[str, Any] | None) -> dict[str, Any]:
    """What an index is, and of what it was made. queries: facts of another model that may ask it."""
    facts = {key: vectors.manifest[key] for key in ("model", "kind", "prompt", "length", "data", "count")}
    # Vectors of any dtype live in one space: how these were computed does not matter to a query.
    facts["model"] = {key: value for key, value in facts["model"].items() if key != "read_as"}
    facts |= {} if queries is None else {"queries": queries}
    facts |= {"dtype": vectors.dtype} if vectors.dtype in (*SMALL, SPARSE) else {}
    facts |= {"shard_rows": vectors.manifest["shard_rows"]} if vectors.dtype == SPARSE else {}
    return {"version": 1, "factory": factory, "dimension": vectors.dimension, **facts}


def is_there(out: Path, facts: dict[str, Any], finer: Vectors | None = None) -> bool:
    """Whether `out` holds the index of these facts, whole: so a command that was killed after its last file can be repeated.

    Raises InputError where it holds another one, or one that is damaged.
    """
    if not (out / META).exists():
        return False
    found = read_json(out / META, AGAIN)
    sums = found.pop("checksums", {})
    kept = out / RESCORE / MANIFEST
    finer_there = read_json(kept, AGAIN) if kept.exists() else None
    if digest(found) != digest(facts) or finer_there != (finer.manifest if finer is not None else None):
        raise InputError(out, "already holds another index", "choose another folder, or delete it")
    check_written(out, sums, sums, AGAIN)
    say_once(f"{out}: holds this index already")
    return True


def check_k(k: int, passages: int, where: str = "k", of: object = None) -> None:
    """Raise InputError when more results are requested than there are passages; of: the file that holds them."""
    if k > passages:
        what = f"{k} results requested of {passages} passages" + ("" if of is None else f" in {of}")
        raise InputError(where, what, f"use at most {passages}")
