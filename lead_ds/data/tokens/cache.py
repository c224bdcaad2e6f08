"""Every text's tokens, made once and mapped from disk: a window is then put together without a tokenizer.

A column holds one model's tokens of all queries or all passages: shards of `SHARD` texts, each one file that appears
whole or not at all (`lead_ds.io.mapped`). A file records what it was made of: tokenizer, prompt, length, text file.
What is there is kept, what is missing is made; processes that start together share the work, and wait for each other
only at the last shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.data.collections.texts import Texts
from lead_ds.data.groups.by_id import IdGroups
from lead_ds.data.groups.group import Group, Groups
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.pairs import PairForm
from lead_ds.data.tokens.tokenizer import tokenizer_checksum
from lead_ds.errors import InputError, RunError
from lead_ds.io.mapped import Arrays, cache_dir, locked, path_hash, read_arrays, replaced, signature, write_arrays

SHARD = 1 << 15  # texts of a file
BLOCK = 1 << 10  # texts of a call of the tokenizer
PROBES = 64  # pairs that are compared with the tokenizer's own before any are put together here


class Column:
    """One model's tokens of every text of a file, int [L] each. Picklable: shards are mapped when they are first read."""

    def __init__(self, root: Path, texts: Texts, encoder: TextEncoder, prompt: str, length: int | None) -> None:
        """length: of texts that are read alone; None: whole texts, for pairs."""
        self.texts, self.encoder, self.prompt, self.length = texts, encoder, prompt, length
        self.key = {
            "version": 1,
            "source": signature(texts.path),
            "kind": texts.kind,
            "tokenizer": tokenizer_checksum(encoder.tokenizer),
            "prompt": prompt,
            "length": length,
            "texts_of_shard": SHARD,
        }
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / f"{path_hash(texts.path)}-{texts.kind}-{name}"
        self.shards = -(-len(texts) // SHARD)
        self._open: dict[int, Arrays] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __getitem__(self, row: int) -> np.ndarray:
        """The tokens of a text."""
        shard, place = divmod(row, SHARD)
        arrays = self._open.get(shard)
        if arrays is None:
            found = self._read(shard)
            if found is None:
                raise RunError(self._path(shard), "was removed or replaced while it was needed", "start again")
            arrays = self._open[shard] = found
        starts = arrays["starts"]
        return arrays["ids"][int(starts[place]) : int(starts[place + 1])]

    def missing(self) -> list[int]:
        """Shards that are not there, or of something else."""
        return [shard for shard in range(self.shards) if self._read(shard) is None]

    def build(self, first: int) -> None:
        """Make the shards that are missing, from the `first` on and then around, so that processes share them."""
        for shard in (*range(first, self.shards), *range(min(first, self.shards))):
            path = self._path(shard)
            if self._read(shard) is None:
                with locked(path):
                    if self._read(shard) is None:  # another process may have made it while this one waited
                        self._write(path, shard)
        described = self.key | {"file": str(self.texts.path), "model": self.encoder.path, "texts": len(self.texts)}
        with _one_line_errors(self.folder):
            replaced(
                self.folder / "manifest.json", lambda path: path.write_text(json.dumps(described, indent=1) + "\n")
            )

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.idx"

    def _read(self, shard: int) -> Arrays | None:
        return read_arrays(self._path(shard), self.key | {"shard": shard})

    def _write(self, path: Path, shard: int) -> None:
        rows = range(shard * SHARD, min((shard + 1) * SHARD, len(self.texts)))
        kind = np.uint16 if len(self.encoder.tokenizer) <= 1 << 16 else np.uint32
        ids, lengths = [np.zeros(1, kind)[:0]], [np.zeros(1, np.int64)]
        for start in range(rows.start, rows.stop, BLOCK):
            texts = self.texts.texts(rows[start - rows.start : start - rows.start + BLOCK])
            encoded = self.encoder.ids([self.prompt + text for text in texts], self.length)
            ids += [np.array(row, kind) for row in encoded]
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        arrays: Arrays = {"ids": np.concatenate(ids), "starts": np.cumsum(np.concatenate(lengths))}
        with _one_line_errors(path):
            write_arrays(path, self.key | {"shard": shard}, arrays)


class TokenCache:
    """What `lead_ds.data.batches.read` gives for some groups, out of columns."""

    def __init__(self, encoder: TextEncoder, queries: Column, passages: Column, pairs: PairForm | None) -> None:
        self.encoder, self.queries, self.passages, self.pairs = encoder, queries, passages, pairs

    @classmethod
    def open(cls, place: bool | str, groups: Groups, encoder: TextEncoder, *, rank: int) -> TokenCache | None:
        """The cache of an encoder's tokens, complete: what is missing is made now, by all processes that call this.

        place: a folder, or true for the folder of derived files (`cache_dir`). None where a model's tokens of a pair do not
        follow from those of its two texts (a reranker's prompt, most slow tokenizers). None, too, where texts go through
        a chat template. Raises InputError for groups that hold their own texts; RunError where the folder cannot be written.
        """
        if not isinstance(groups, IdGroups):
            what = "groups that carry their texts have no corpus whose tokens could be kept"
            raise InputError("data.token_cache", what, "set it to false, or bring the data to the canonical layout")
        pairs = None
        if encoder.message is not None:
            return None
        if encoder.reads_pairs:
            pairs = PairForm.of(encoder, _probes(groups))
            if pairs is None:
                return None
        root = cache_dir() / "tokens" if place is True else Path(str(place))
        prompts = (encoder.query_prompt, encoder.query_length), (encoder.passage_prompt, encoder.passage_length)
        columns = [
            Column(root, texts, encoder, prompt, length if pairs is None else None)
            for texts, (prompt, length) in zip((groups.queries, groups.corpus), prompts, strict=True)
        ]
        for column in columns:
            missing = column.missing()
            if not missing:
                continue
            if rank == 0:
                count = min(len(missing) * SHARD, len(column.texts))
                _say(
                    f"{encoder.path}: tokens of {count} texts of {column.texts.path.name} are made once, in {column.folder}"
                )
            started = time.monotonic()
            with _all_cores():
                column.build(rank * column.shards // max(1, int(os.environ.get("WORLD_SIZE", "1"))))
            if rank == 0:
                _say(f"{column.texts.path.name}: {time.monotonic() - started:.0f} s")
        return cls(encoder, columns[0], columns[1], pairs)

    def read(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The `queries` and `passages`, or `pairs`, of some groups: equal to what the encoder makes of their texts."""
        queries = [self.queries[group.query_key] for group in groups]
        passages = [self.passages[int(key)] for group in groups for key in group.keys]
        if self.pairs is None:
            return {"queries": self.encoder.query_tokens(queries), "passages": self.encoder.passage_tokens(passages)}
        size = len(passages) // len(queries)
        asked = [query for query in queries for _ in range(size)]
        return {"pairs": self.encoder.padded(*self.pairs.join(asked, passages))}


def _probes(groups: IdGroups) -> list[tuple[str, str]]:
    """Pairs of real texts, and of such that are long, short and empty."""
    queries = [groups.queries.text(i * len(groups.queries) // PROBES) for i in range(PROBES)]
    passages = [groups.corpus.text(i * len(groups.corpus) // PROBES) for i in range(PROBES)]
    long = [" ".join(texts) for texts in (queries, passages)]
    return [
        *zip(queries, passages, strict=True),
        (long[0], passages[0]),
        (queries[0], long[1]),
        (long[1], long[0]),
        ("", ""),
    ]


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizers use every core. Elsewhere they must not: a thread beside the training's would slow it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Make the folder of `path`, and turn the system's error into one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise RunError(path, what, "name another folder with data.token_cache, or set it to false") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
