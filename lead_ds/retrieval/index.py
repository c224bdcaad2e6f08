"""A FAISS index of encoded vectors, on disk and on GPUs.

D width of a vector.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lead_ds.errors import InputError, RunError
from lead_ds.io.files import atomic, read_json, write_json
from lead_ds.io.owner import owned
from lead_ds.io.progress import progress
from lead_ds.retrieval.encode import IDS, Side, Vectors, read_ids

INDEX, META = "index.faiss", "index.json"
CHUNK = 65_536  # vectors added at once
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
    seed: int = 0,
    quiet: bool = False,
    queries: dict[str, Any] | None = None,
) -> Path:
    """Build an inner-product index of `vectors` and write it to the folder `out`.

    factory: FAISS's index string: Flat (exact), IVF4096,Flat, HNSW32, PQ64, IVF4096,PQ64, OPQ64,IVF4096,PQ64x4fs, ... Vectors
    are read from disk a chunk at a time. gpus: train and add on so many, the index sharded over them or replicated; an index
    that is not trained is filled on the CPU, where that is a copy. queries: facts of another model that may ask it.
    `out` holds the index, the ids, and what the vectors were made of. Raises InputError for a factory string that FAISS
    does not know, or too few vectors for it; RunError when FAISS or the disk fails.
    """
    import faiss

    out = Path(out)
    if queries is not None and queries["dimension"] != vectors.dimension:
        what = f"gives vectors of {queries['dimension']} dimensions, the index is of {vectors.dimension}"
        raise InputError("--query-model", what, "name a model in the same space")
    with owned(out, "another lead-ds index"):
        if (out / META).exists():
            raise InputError(out, "already holds an index", "choose another folder, or delete it")
        try:
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
            sample = _sample(vectors, min(len(vectors), wanted), seed)
            try:
                index.train(sample)
            except RuntimeError as error:
                what = f"{len(vectors)} vectors cannot train {factory!r}: {_reason(error)}"
                raise InputError("factory", what, "use Flat, or fewer cells") from None
        with progress(f"indexing {factory}", len(vectors), "vectors", shown=not quiet) as meter:
            for chunk in _chunks(vectors):
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
        with atomic(out / INDEX) as temporary:
            try:
                faiss.write_index(index, str(temporary))
            except RuntimeError as error:
                raise RunError(out / INDEX, f"cannot be written: {_reason(error)}", "check the free space") from None
        with atomic(out / IDS) as temporary:
            shutil.copyfile(vectors.folder / IDS, temporary)
        asks = {} if queries is None else {"queries": queries}
        facts = {key: vectors.manifest[key] for key in ("model", "kind", "prompt", "length", "data", "count")}
        # Last: its presence is what marks the folder as holding an index.
        write_json(out / META, {"version": 1, "factory": factory, "dimension": vectors.dimension, **facts, **asks})
        return out


class Index:
    """An index of `build_index`, loaded for search."""

    def __init__(self, folder: Path, meta: dict[str, Any], index: Any, ids: list[str], gpus: int) -> None:
        self.folder, self.meta, self.ids, self._index, self._gpus = folder, meta, ids, index, gpus

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        gpus: int = 0,
        layout: GpuLayout = "shard",
        nprobe: int | None = None,
        ef_search: int | None = None,
    ) -> Index:
        """Map an index into memory, or load it onto `gpus`, in float16, sharded (each holds a part) or replicated.

        nprobe: cells that an IVF index looks into; ef_search: candidates that HNSW keeps. Raises InputError when the folder
        holds no index, or the index has no such parameter.
        """
        import faiss

        folder = Path(folder)
        meta = read_json(folder / META, "make it with lead-ds index")
        try:
            # Mapped, not read: an index larger than memory can be searched, its pages come when they are looked at.
            # Older versions of FAISS map IVF lists only.
            mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
            index = faiss.read_index(str(folder / INDEX), 0 if gpus else mapped)
        except (RuntimeError, OSError) as error:
            raise InputError(folder, f"its index cannot be read: {_reason(error)}", "build it again") from None
        ids = read_ids(folder / IDS, "build the index again")
        if not index.ntotal == len(ids) == meta.get("count") or index.d != meta.get("dimension"):
            raise InputError(folder, "its index, ids and index.json do not belong together", "build it again")
        for name, value in (("nprobe", nprobe), ("efSearch", ef_search)):
            if value is not None:
                try:
                    faiss.ParameterSpace().set_index_parameter(index, name, value)
                except RuntimeError:
                    raise InputError(folder, f"a {meta['factory']} index has no {name}", "leave it out") from None
        return cls(folder, meta, _to_gpus(index, gpus, layout, half=True), ids, gpus)

    def __len__(self) -> int:
        return len(self.ids)

    def check_model(self, model: dict[str, Any]) -> None:
        """Raise InputError unless queries of this model (see `model_facts`) live in the same space as the index."""
        made = self.meta["model"]
        changed = [key for key in made if made[key] != model.get(key)]
        if changed:
            told = ", ".join(f"{key} {made[key]}, here {model.get(key)}" for key in changed)
            raise InputError(self.folder, f"was made by another model: {told}", "use that model, or build it again")

    def check_two(self, query: dict[str, Any], document: str) -> None:
        """Raise InputError unless the model with the checksum `document` made the index, as wide as the queries' vectors."""
        if self.meta["model"]["checksum"] != document:
            raise InputError(self.folder, "was made by another document model", "use that one, or build it again")
        if query["dimension"] != self.meta["dimension"]:
            what = f"holds vectors of {self.meta['dimension']} dimensions, the query model gives {query['dimension']}"
            raise InputError(self.folder, what, "use a model of that width")

    def check_side(self, side: Side) -> None:
        """Raise InputError when the model now reads such texts with another prompt than the index was made with."""
        if side.kind == self.meta["kind"] and side.prompt != self.meta["prompt"]:
            what = f"was made with the prompt {self.meta['prompt']!r}, the model now has {side.prompt!r}"
            raise InputError(self.folder, what, "use the model as it was, or encode and index again")

    def search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [Q, k] and rows int64 [Q, k], best first; row -1 where the index found fewer.

        Raises InputError for a k beyond the index, or that FAISS cannot return.
        """
        check_k(k, len(self))
        if k < 1 or (self._gpus and k > GPU_K):
            limit = f"at most {GPU_K} on GPUs" if k > 0 else "at least 1"
            raise InputError("k", f"{k} results cannot be searched for", f"use {limit}")
        return self._index.search(np.ascontiguousarray(queries_QD, np.float32), k)


def check_k(k: int, passages: int, where: str = "k") -> None:
    """Raise InputError when more results are requested than there are passages."""
    if k > passages:
        raise InputError(where, f"{k} results requested of {passages} passages", f"use at most {passages}")


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


def _chunks(vectors: Vectors) -> Iterator[np.ndarray]:
    for block in vectors.blocks():
        for start in range(0, len(block), CHUNK):
            yield np.ascontiguousarray(block[start : start + CHUNK], np.float32)


def _sample(vectors: Vectors, count: int, seed: int) -> np.ndarray:
    """`count` vectors drawn without replacement, float32."""
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), count, replace=False))
    parts = []
    for shard, block in enumerate(vectors.blocks()):
        own = vectors.rows(shard)
        parts.append(block[rows[(rows >= own.start) & (rows < own.stop)] - own.start].astype(np.float32))
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
