"""Texts to vectors: sorted by length, in batches, every process its share; to memory, or to files that outlive a kill.

D width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.collections.texts import Texts
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.longest_first import Tokenised, longest_first
from lead_ds.errors import InputError, LeadError, RunError
from lead_ds.io.facts import check_facts
from lead_ds.io.files import atomic, data_checksum, data_checksums, read_json, write_json
from lead_ds.io.notes import say_once
from lead_ds.io.owner import owned
from lead_ds.io.progress import Progress, progress
from lead_ds.io.shards import MANIFEST, refuse_strangers, turns, unfinished
from lead_ds.retrieval.peers import ALONE, Peers, largest_share, share
from lead_ds.retrieval.precision import Embed, Precision, in_precision
from lead_ds.retrieval.small import CALIBRATED_ON, SMALL, quantise, ranges_of
from lead_ds.retrieval.sparse import SparseVectors, finite_rows
from lead_ds.retrieval.vectors import AGAIN, IDS, SPARSE, Vectors

STRETCH = 8192  # texts tokenised at once and sorted by length together: little padding, little memory
SHARD_ROWS = 65_536
FULL = 512  # tokens of a text of full length, where the model reads more: a batch must fit in memory
_ANOTHER = "delete it, or choose another folder"


@dataclass(frozen=True)
class Side:
    """How one kind of text is read: kind, prompt and length decide its vectors beside the model."""

    kind: Literal["corpus", "queries"]
    prompt: str
    length: int

    @classmethod
    def of(cls, encoder: TextEncoder, kind: Literal["corpus", "queries"]) -> Side:
        """As `encoder` reads queries or passages."""
        if kind == "queries":
            return cls(kind, encoder.query_prompt, encoder.query_length)
        return cls(kind, encoder.passage_prompt, encoder.passage_length)


@dataclass(frozen=True)
class Encoding:
    """How a model is run over texts: how many of full length (FULL at most) are in a batch, on which device, in which precision.

    precision: of its matrix products. lockstep: the model is sharded over the processes, so that `encode_to` has all of them
    run it equally often; a search over several processes does so anyway.
    """

    batch_size: int = 64
    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    lockstep: bool = False


@dataclass(frozen=True)
class Stored:
    """How vectors are stored: their dtype, and how many are in a shard (None: as many as give every process some).

    dtype: int8 is calibrated on a sample of the texts; binary and ubinary are packed signs; sparse: float32 without its zeros,
    of a model of sparse vectors.
    """

    dtype: Literal["float32", "float16", "int8", "binary", "ubinary", "sparse"] = "float32"
    shard_rows: int | None = None


PLAIN, AS_FLOATS = Encoding(), Stored()


def encode_share(
    embed: Embed,
    encoder: TextEncoder,
    kind: Literal["corpus", "queries"],
    texts: Callable[[Sequence[int]], list[str]],
    rows: Sequence[int],
    how: Encoding = PLAIN,
    *,
    forwards: int = 0,
    meter: Progress | None = None,
) -> Any:
    """Vectors [len(rows), D] float32 of `rows`, in their order, on the device, without gradient; [0, 0] of no rows.

    texts: rows -> their texts. Stretches of them are tokenised while the model reads the one before, and sorted by their
    number of tokens. A batch of texts shorter or longer than full length (FULL tokens at most) holds as many as have no more
    tokens, padding counted.
    `forwards`: run the model at least so many times, on a text of no interest once the rows are done, with batch_size texts
    in every batch. Under ZeRO-3 every process must take part in every forward of any of them.
    SparseVectors where `embed` gives sparse ones. Raises RunError naming the text whose vector is not finite, InputError
    where the device lacks the precision.
    """
    side: Literal["queries", "passages"] = "queries" if kind == "queries" else "passages"
    length, batch_size = min(Side.of(encoder, kind).length, FULL), how.batch_size
    embed = in_precision(embed, how.precision, how.device)

    def load(stretch: range) -> Tokenised:
        return Tokenised(encoder, *encoder.rows(texts([rows[i] for i in stretch]), side), side)

    def encoded() -> Iterator[tuple[list[int], Tensor]]:
        """Positions in `rows` and their vectors, a batch at a time."""
        done = 0
        # Where batches are counted, a stretch is whole batches.
        stretch, budget = -(-STRETCH // batch_size) * batch_size, None if forwards else batch_size * length
        for places, batch in longest_first(len(rows), load, batch_size=batch_size, stretch=stretch, budget=budget):
            vectors_BD = embed({name: x.to(how.device) for name, x in batch.items()}).float()
            _refuse_not_finite(vectors_BD, kind, texts, [rows[i] for i in places])
            yield places, vectors_BD
            done += 1
            if meter is not None:
                meter.advance(len(places))
        for _ in range(forwards - done):
            embed({name: x.to(how.device) for name, x in encoder.padded(*encoder.rows(["a"], side)).items()})

    out: Tensor | None = None
    with torch.no_grad():
        batches = encoded()
        for positions, vectors_BD in batches:
            if vectors_BD.is_sparse:
                return SparseVectors.of(chain([(positions, vectors_BD)], batches), len(rows))
            if out is None:
                out = torch.empty(len(rows), vectors_BD.shape[1], device=vectors_BD.device)
            out[torch.tensor(positions, device=out.device)] = vectors_BD
    return torch.empty(0, 0, device=how.device) if out is None else out


_NOT_FINITE = "try dtype=fp32 or --precision fp32; else a weight of the model is not finite: lead-ds inspect names it"


def _refuse_not_finite(
    vectors_BD: Tensor, kind: str, texts: Callable[[Sequence[int]], list[str]], rows: Sequence[int]
) -> None:
    finite_B = finite_rows(vectors_BD)
    if not finite_B.all():
        row = rows[int((~finite_B).nonzero()[0])]
        what = f"the model's vector of text {row + 1} is not finite: {texts([row])[0][:80]!r}"
        raise RunError(kind, what, _NOT_FINITE)


def encode_to(
    folder: str | Path,
    embed: Embed,
    encoder: TextEncoder,
    texts: Texts,
    model: dict[str, Any],
    how: Encoding = PLAIN,
    stored: Stored = AS_FLOATS,
    *,
    peers: Peers = ALONE,
) -> Vectors:
    """Encode all of `texts` into a folder; call it again after a kill, on any number of processes, to finish the job.

    A shard is written whole or not at all; those that are there are kept. model: facts that identify the model (checksum,
    pooling, normalize), kept in the manifest with prompt, length and a checksum of the texts.
    Every process calls this, on a file system they share. Raises
    InputError when the folder holds vectors made otherwise, or the device lacks the precision, RunError when a file cannot be
    written.
    """
    folder, batch_size = Path(folder), how.batch_size
    in_precision(embed, how.precision, how.device)  # refused before anything is written
    with owned(folder, "another lead-ds encode", peers):
        agreed: dict[str, Any] | LeadError = {}
        small = _calibrated(folder, embed, encoder, texts, how, stored, peers) if stored.dtype in SMALL else {}
        if stored.dtype == SPARSE:
            small = {"dimension": model["dimension"]}
        if peers.rank == 0:
            shard_rows = stored.shard_rows or min(SHARD_ROWS, -(-len(texts) // (peers.world * batch_size)) * batch_size)
            facts = {
                "version": 1,
                "model": model,
                **asdict(Side.of(encoder, texts.kind)),
                "dtype": stored.dtype,
                "precision": how.precision,
                "count": len(texts),
                "shard_rows": shard_rows,
                **small,
            }
            try:
                agreed = _agree(folder, {**facts, "data": data_checksum(texts.path)}, texts)
            except LeadError as error:
                agreed = error
        agreed = peers.from_main(agreed)
        if isinstance(agreed, LeadError):  # on every process, or the others would wait for ever
            raise agreed
        vectors = Vectors(folder, agreed)
        paths = [vectors.path(shard) for shard in range(vectors.shards)]
        sums = vectors.manifest.get("checksums") or {}

        def changed(path: Path) -> str | None:
            return "not as it was written" if sums and sums.get(path.name) != data_checksum(path) else None

        todo = peers.from_main(unfinished(paths, changed, say_once) if peers.rank == 0 else [])
        mine = turns(todo, peers.rank, peers.world)
        total = sum(len(vectors.rows(shard)) for shard in mine if shard is not None)
        with progress(f"encoding {texts.path.name}", total, "texts", shown=peers.rank == 0 and total > 0) as meter:
            for turn, shard in enumerate(mine):
                # The turn's largest share sets how often every process runs the model.
                turn_shards = todo[turn * peers.world : (turn + 1) * peers.world]
                most = max(len(vectors.rows(other)) for other in turn_shards)
                forwards = -(-most // batch_size) if how.lockstep else 0
                rows = range(0) if shard is None else vectors.rows(shard)
                encoded = encode_share(
                    embed, encoder, texts.kind, texts.texts, rows, how, forwards=forwards, meter=meter
                )
                if shard is not None:
                    if isinstance(encoded, SparseVectors):
                        with atomic(vectors.path(shard)) as temporary:
                            encoded.write(temporary)
                    else:
                        _write_shard(vectors.path(shard), encoded.cpu().numpy(), stored.dtype, small.get("ranges"))
        peers.barrier()
        if peers.rank == 0 and (todo or not sums):
            write_json(folder / MANIFEST, vectors.manifest | {"checksums": data_checksums(folder, vectors.names)})
        peers.barrier()
        return Vectors.open(folder, verify=False)


def _calibrated(
    folder: Path, embed: Embed, encoder: TextEncoder, texts: Texts, how: Encoding, stored: Stored, peers: Peers
) -> dict[str, Any]:
    """What quantised vectors need to be read: their width, and of int8 each dimension's range over a sample of the texts.

    Of vectors that an earlier call began, its own. Every process calls this, and encodes its share of the sample.
    """
    known = read_json(folder / MANIFEST, AGAIN) if peers.rank == 0 and (folder / MANIFEST).exists() else {}
    known = peers.from_main({key: known[key] for key in ("dimension", "ranges") if key in known})
    if known:
        return known
    count = CALIBRATED_ON if stored.dtype == "int8" else peers.world
    sample = np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int).tolist()
    own = share(len(sample), peers)
    forwards = -(-largest_share(len(sample), peers) // how.batch_size) if how.lockstep else 0
    rows = [sample[i] for i in own]
    parts = peers.all(encode_share(embed, encoder, texts.kind, texts.texts, rows, how, forwards=forwards).cpu().numpy())
    vectors = np.concatenate([part for part in parts if len(part)])
    found: dict[str, Any] = {"dimension": vectors.shape[1]}
    return found | ({"ranges": ranges_of(vectors).tolist()} if stored.dtype == "int8" else {})


def _agree(folder: Path, facts: dict[str, Any], texts: Texts) -> dict[str, Any]:
    """The manifest of an earlier call, if it is of the same vectors; else a new one."""
    path = folder / MANIFEST
    if path.exists():
        old = read_json(path, "delete the folder, or choose another one")
        # The size of a shard is how the first call cut the work, not what the vectors are.
        known = {key: old.get(key) for key in facts} | {"shard_rows": facts["shard_rows"]}
        check_facts(folder, "holds vectors", known, facts, _ANOTHER)
        return old
    refuse_strangers(folder, "vectors-*.np[yz]", _ANOTHER)
    with atomic(folder / IDS) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for name in texts.ids:
            if "\n" in name or "\r" in name:
                raise InputError(texts.path, f"the id {name!r} holds a line break", "use ids of one line")
            file.write(name + "\n")
    write_json(path, facts)
    return facts


def _write_shard(path: Path, vectors: np.ndarray, dtype: str, ranges: list[list[float]] | None) -> None:
    with np.errstate(over="ignore"):
        if dtype in SMALL:
            vectors = quantise(vectors, dtype, None if ranges is None else np.array(ranges, np.float32))
        else:
            vectors = vectors.astype(dtype)
    if not np.isfinite(vectors).all():
        raise RunError(path, f"the model gave vectors that {dtype} cannot hold", "encode as float32; check the model")
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)
