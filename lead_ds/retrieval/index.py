"""A FAISS index of encoded vectors, on disk and on GPUs.

D width of a vector.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lead_ds.data.collections.texts import Ids
from lead_ds.errors import InputError
from lead_ds.io.files import atomic, check_written, data_checksums, write_json
from lead_ds.io.owner import owned
from lead_ds.io.progress import progress
from lead_ds.io.shards import MANIFEST, refuse_other
from lead_ds.retrieval.indexed import META, RESCORE, Indexed, check_k, facts_of, is_there, read_meta
from lead_ds.retrieval.small import RESCORED, quantise, rescore, unsigned
from lead_ds.retrieval.vectors import IDS, SPARSE, Vectors

INDEX = "index.faiss"
CHUNK = 65_536  # vectors added at once
WRITTEN_AT_ONCE = 1 << 20  # bytes
PQ_CENTROIDS = 256
# Training vectors per centroid: what FAISS uses at most, and does well with.
PER_CENTROID, PER_CENTROID_AT_LEAST = 256, 64
TRAIN_MAX = 1 << 20  # vectors that an index is trained on, where the lower bound does not ask for more
GPU_K = 2048  # what FAISS can return on a GPU
GpuLayout = Literal["shard", "replicate"]


def build_index(
    vectors: Vectors,
    out: str | Path,
    factory: str = "Flat",
    *,
    gpus: int = 0,
    layout: GpuLayout = "shard",
    quiet: bool = False,
    queries: dict[str, Any] | None = None,
    rescore: Vectors | None = None,
) -> Path:
    """Build an inner-product index of `vectors` and write it to the folder `out`.

    factory: FAISS's index string: Flat (exact), IVF4096,Flat, HNSW32, PQ64, IVF4096,PQ64, OPQ64,IVF4096,PQ64x4fs, ... Vectors
    are read from disk a chunk at a time. gpus: train and add on so many, the index sharded over them or replicated; an index
    that is not trained is filled on the CPU, where that is a copy. queries: facts of another model that may ask it.
    Vectors of signs become a binary index, searched by Hamming distance (Flat, IVF4096, HNSW32); int8 ones a Flat of 8 bits.
    rescore: finer vectors of the same texts, by which candidates are scored again; copied into `out`, and mapped when
    searched. Default: of signs, these themselves.
    Sparse vectors become an inverted index (`lead_ds.retrieval.inverted`).
    `out` holds the index, the ids, and what the vectors were made of. Raises InputError for a factory string that FAISS
    does not know, or too few vectors for it; RunError when FAISS or the disk fails.
    """
    out = Path(out)
    if queries is not None and queries["dimension"] != vectors.dimension:
        what = f"gives vectors of {queries['dimension']} dimensions, the index is of {vectors.dimension}"
        raise InputError("--query-model", what, "name a model in the same space")
    if vectors.dtype == SPARSE:
        from lead_ds.retrieval.inverted import FACTORY, build_inverted  # and scipy, which nothing else needs here

        for name, ignored in (("factory", factory not in ("Flat", FACTORY)), ("gpus", gpus), ("rescore", rescore)):
            if ignored:
                raise InputError(name, "is of dense vectors, and these are sparse", "leave it out")
        return build_inverted(vectors, out, quiet=quiet, queries=queries)
    import faiss

    with owned(out, "another lead-ds index"):
        signs = vectors.dtype.endswith("binary")
        factory = small_factory(factory, vectors.dtype, gpus)
        finer = rescore if rescore is not None else vectors if signs else None
        check_rescore(vectors, finer)
        facts = facts_of(vectors, factory, queries)
        if is_there(out, facts, finer):
            return out
        refuse_other(out, META)
        index: Any
        try:
            if signs:
                index = faiss.index_binary_factory(8 * -(-vectors.dimension // 8), factory)
            else:
                index = faiss.index_factory(vectors.dimension, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            what = f"cannot make {factory!r} of vectors {vectors.dimension} wide: {_reason(error)}"
            raise InputError(
                "factory", what, "see FAISS's wiki, The index factory; for example Flat or IVF256,Flat"
            ) from None
        vectors.ids()  # are reported before the work, if they are not as many
        on_gpus = gpus > 0 and not index.is_trained  # FAISS fills a sharded Flat in one call only, and HNSW not at all
        if not index.is_trained:
            index = _to_gpus(index, gpus, layout, half=False)
            cells = _cells(factory)
            wanted = min(PER_CENTROID * max(cells, PQ_CENTROIDS), max(TRAIN_MAX, PER_CENTROID_AT_LEAST * cells))
            sample = _sample(vectors, min(len(vectors), wanted), signs=signs)
            try:
                index.train(sample)
            except RuntimeError as error:
                what = f"{len(vectors)} vectors cannot train {factory!r}: {_reason(error)}"
                raise InputError("factory", what, "use Flat, or fewer cells") from None
        with progress(f"indexing {factory}", len(vectors), "vectors", shown=not quiet) as meter:
            for chunk in _chunks(vectors, signs=signs):
                if not np.isfinite(chunk).all():
                    what = "holds a vector that is not finite, which would be found first, or never"
                    raise InputError(
                        vectors.folder, what, "delete the folder, see the model's weights, and encode again"
                    )
                try:
                    index.add(chunk)
                except RuntimeError as error:
                    what = f"{factory!r} does not take vectors without ids: {_reason(error)}"
                    raise InputError("factory", what, "leave IDMap out: ids are kept beside the index") from None
                meter.advance(len(chunk))
        if on_gpus:
            index = faiss.index_gpu_to_cpu(index)
        # Into a file of ours: FAISS closes its own without looking whether the last block reached the disk.
        with atomic(out / INDEX) as temporary, temporary.open("wb") as file:
            write: Any = faiss.write_index_binary if signs else faiss.write_index
            writer: Any = faiss.PyCallbackIOWriter  # type: ignore[attr-defined]
            write(index, writer(file.write, WRITTEN_AT_ONCE))
        with atomic(out / IDS) as temporary:
            shutil.copyfile(vectors.folder / IDS, temporary)
        if finer is not None:
            _copy(finer, out / RESCORE)
        # Last: its presence is what marks the folder as holding an index.
        sums = data_checksums(out, (INDEX, IDS))
        write_json(out / META, facts | {"checksums": sums})
        return out


class Index(Indexed):
    """An index of `build_index`, loaded for search by FAISS."""

    def __init__(self, folder: Path, meta: dict[str, Any], ids: Sequence[str], index: Any, gpus: int) -> None:
        super().__init__(folder, meta, ids)
        self._index, self._gpus = index, gpus
        self._finer: Vectors | None = None
        self._rescored = 0

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        gpus: int = 0,
        layout: GpuLayout = "shard",
        nprobe: int | None = None,
        ef_search: int | None = None,
        rescored: int | None = None,
    ) -> Indexed:
        """Map an index into memory, or load it onto `gpus`, in float16, sharded (each holds a part) or replicated.

        nprobe: cells that an IVF index looks into; ef_search: candidates that HNSW keeps. rescored: times k candidates that are
        scored again by finer vectors, where the index has such (default: RESCORED); 0: none. Raises InputError when the folder
        holds no index, or the index has no such parameter.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        if meta.get("dtype") == SPARSE:
            from lead_ds.retrieval.inverted import InvertedIndex

            given = {"gpus": gpus, "nprobe": nprobe, "ef_search": ef_search, "rescored": rescored}
            return InvertedIndex.of(folder, meta, given)
        import faiss

        # FAISS trusts what it reads: of a damaged file it may never come back.
        older = {INDEX: meta["checksum"]} if "checksum" in meta else None
        check_written(folder, (INDEX,) if older else (INDEX, IDS), meta.get("checksums", older), "build it again")
        try:
            # Mapped, not read: an index larger than memory can be searched, its pages come when they are looked at.
            # Older versions of FAISS map IVF lists only.
            mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
            signs = str(meta.get("dtype", "")).endswith("binary")
            read: Any = faiss.read_index_binary if signs else faiss.read_index
            index: Any = read(str(folder / INDEX), 0 if gpus or signs else mapped)
        except (RuntimeError, OSError) as error:
            raise InputError(folder, f"its index cannot be read: {_reason(error)}", "build it again") from None
        ids = Ids.of_lines(folder / IDS, "build the index again")
        width = meta["dimension"]
        if not index.ntotal == len(ids) == meta["count"] or index.d != (8 * -(-width // 8) if signs else width):
            raise InputError(folder, "its index, ids and index.json do not belong together", "build it again")
        for name, value in (("nprobe", nprobe), ("efSearch", ef_search)):
            if value is not None and signs and (field := _find(index, name)) is not None:
                setattr(field, name, value)
            elif value is not None:
                try:
                    if signs:
                        raise RuntimeError
                    faiss.ParameterSpace().set_index_parameter(index, name, value)
                except RuntimeError:
                    raise InputError(folder, f"a {meta['factory']} index has no {name}", "leave it out") from None
        finer = Vectors.open(folder / RESCORE) if (folder / RESCORE / MANIFEST).exists() else None
        if rescored and finer is None:
            raise InputError(folder, "has no finer vectors to rescore by", "build it with --rescore, or leave it out")
        opened = cls(folder, meta, ids, index if signs else _to_gpus(index, gpus, layout, half=True), gpus)
        opened._finer, opened._rescored = finer, RESCORED if rescored is None else rescored
        return opened

    def search(self, queries_QD: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [Q, k] and rows int64 [Q, k], best first; row -1 where the index found fewer.

        Where the index has finer vectors, more candidates are scored again by these; of signs alone, scores are how many agree
        less how many do not.

        Raises InputError for a k beyond the index, or that FAISS cannot return.
        """
        check_k(k, len(self), of=self.folder)
        if k < 1 or (self._gpus and k > GPU_K):
            limit = f"at most {GPU_K} on GPUs" if k > 0 else "at least 1"
            raise InputError("k", f"{k} results cannot be searched for", f"use {limit}")
        again = self._rescored if self._finer is not None else 0
        deep, signs = min(max(1, again) * k, len(self)), str(self.meta.get("dtype", "")).endswith("binary")
        if signs:
            apart_Qk, rows_Qk = self._index.search(quantise(queries_QD, "ubinary"), deep)
            scores_Qk = (self.meta["dimension"] - 2 * apart_Qk).astype(np.float32)
        else:
            scores_Qk, rows_Qk = self._index.search(np.ascontiguousarray(queries_QD, np.float32), deep)
        finer = self._finer
        if not again or finer is None:
            return scores_Qk, rows_Qk
        queries = torch.from_numpy(np.ascontiguousarray(queries_QD, np.float32))
        best = rescore(queries, torch.from_numpy(rows_Qk), lambda rows: torch.from_numpy(finer.at(rows.numpy())), k)
        return best[0].numpy(), best[1].numpy()


def small_factory(factory: str, dtype: str, gpus: int) -> str:
    """FAISS's string for vectors of a dtype: what is given where they are floats. Raises InputError for signs on GPUs."""
    if dtype == "int8" and factory == "Flat":
        return "SQ8"
    if not dtype.endswith("binary"):
        return factory
    if gpus:
        raise InputError("gpus", "an index of binary vectors is searched on the CPU", "use --gpus 0")
    return factory if factory.startswith("B") else "B" + factory.removesuffix(",Flat")


def check_rescore(vectors: Vectors, finer: Vectors | None) -> None:
    """Raise InputError unless both are vectors of the same texts by the same model."""
    same = ("model", "kind", "data", "count", "prompt", "length")
    changed = [] if finer is None else [key for key in same if finer.manifest[key] != vectors.manifest[key]]
    if finer is not None and (changed or finer.dimension != vectors.dimension):
        what = f"other vectors than those that are indexed: {', '.join(changed) or 'dimension'} differs"
        raise InputError(finer.folder, what, "encode the same texts with the same model")


def _find(index: Any, name: str) -> Any:
    """The part of a binary index that has a search parameter, which FAISS's parameter space does not reach; None: none."""
    parts = (index, getattr(index, "hnsw", None))
    return next((part for part in parts if part is not None and hasattr(part, name)), None)


def _to_gpus(index: Any, gpus: int, layout: GpuLayout, *, half: bool) -> Any:
    if gpus == 0:
        return index
    import faiss

    found = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if found < gpus:
        what = f"{gpus} requested, FAISS sees {found}"
        raise InputError("gpus", what, "install faiss-gpu, check CUDA_VISIBLE_DEVICES, or use gpus 0")
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = layout == "shard", half
    try:
        return faiss.index_cpu_to_gpus_list(index, options, ngpu=gpus)
    except RuntimeError as error:
        raise InputError("gpus", f"FAISS cannot hold this index on a GPU: {_reason(error)}", "use gpus 0") from None


def _chunks(vectors: Vectors, *, signs: bool = False) -> Iterator[np.ndarray]:
    for block in vectors.blocks():
        for start in range(0, len(block), CHUNK):
            chunk = block[start : start + CHUNK]
            yield np.ascontiguousarray(unsigned(chunk)) if signs else vectors.floats(chunk)


def _copy(vectors: Vectors, folder: Path) -> None:
    """Vectors as they are stored, in a folder of the index."""
    folder.mkdir(exist_ok=True)
    for name in (*vectors.names, MANIFEST):  # the manifest last
        with atomic(folder / name) as temporary:
            shutil.copyfile(vectors.folder / name, temporary)


def _sample(vectors: Vectors, count: int, *, signs: bool = False) -> np.ndarray:
    """`count` vectors drawn without replacement, float32; of signs as they are."""
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), count, replace=False))
    parts = []
    for shard, block in enumerate(vectors.blocks()):
        own = vectors.rows(shard)
        first, last = np.searchsorted(rows, [own.start, own.stop])
        some = block[rows[first:last] - own.start]
        parts.append(unsigned(some) if signs else vectors.floats(some))
    return np.concatenate(parts)


def _cells(factory: str) -> int:
    """The number of cells of an IVF factory string; 0 of others."""
    for part in factory.split(","):
        digits = part.removeprefix("IVF").split("_")[0]
        if part.startswith("IVF") and digits.isdigit():
            return int(digits)
    return 0


def _reason(error: BaseException) -> str:
    """FAISS's message, without the place in its sources."""
    return str(error).strip().rsplit("Error: ", 1)[-1].rsplit(".cpp:", 1)[-1].split(": ", 1)[-1][:160]
