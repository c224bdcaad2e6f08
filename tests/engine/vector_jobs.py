"""What the tests of cached vectors run on real processes: see `tests.engine.jobs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lead_ds.config import Config, load_config
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught.relevance import TeacherCache
from lead_ds.data.taught.vectors import VectorCache, vector_arrays
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.training.distill import settled
from lead_ds.io.shards import mapped
from lead_ds.relevance import VectorFeatures
from lead_ds.teachers import shards
from lead_ds.teachers.cached import CachedTeacher, open_cache
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teach import teach
from lead_ds.teachers.teacher import Lesson
from tests.engine.jobs import distil_each
from tests.helpers.batches import windows_of


@contextmanager
def kept_in_float32() -> Iterator[None]:
    """While open, deviations are stored without rounding: what then differs from the teacher is no matter of precision."""
    before = shards.vector_arrays
    shards.vector_arrays = lambda said, _: vector_arrays(said, np.float32)
    try:
        yield
    finally:
        shards.vector_arrays = before


def keep(config: Config, folder: Path, layers: str, exact: bool = False) -> TeacherCache:
    """Teach vectors into `folder`."""
    if not exact:
        return teach(config, folder, vectors=layers, shard_size=16, quiet=True)
    with kept_in_float32():
        return teach(config, folder, vectors=layers, shard_size=16, quiet=True)


def taught_and_distilled(online: str, folder: str, runs: list[str]) -> dict[str, Any]:
    """Vectors of every layer, with and without rounding, and of layers 1 and 3: how far they are from the teacher's; the
    losses of `runs`; and what is made anew where files are lost or spoilt."""
    config, root = load_config(online), Path(folder)
    with ranks() as here:
        caches = {
            name: keep(config, root / name, layers, exact=name == "exact")
            for name, layers in (("exact", "all"), ("rounded", "all"), ("some", "1,3"))
        }
        return {
            "layers": {name: cache.layers for name, cache in caches.items()},
            "counts": [caches["some"].manifest[kind] for kind in ("queries", "passages")],
            "measured": [cache.manifest["measured"] for cache in caches.values()],
            "distances": {name: distance(online, root / name, here) for name in caches},
            "losses": distil_each(runs),
            "anew": mended(config, root / "some"),
        }


def distance(online: str, folder: Path, here: Ranks) -> dict[str, Any]:
    """Over an epoch, the largest difference of a vector from the teacher's as a multiple of float16's rounding of its
    deviation, and of its length; that of cosines; and the largest deviation over its vector's length."""
    config = load_config(online)
    assert config.teacher is not None
    cached = config.teacher.model_copy(update={"kind": "cached", "path": str(folder)})
    reader = settled(config.model_copy(update={"teacher": cached}))
    assert reader.teacher is not None
    groups = open_groups(config.data)
    cache = open_cache(Lesson.of(reader), groups, here)
    assert isinstance(cache, VectorCache)
    own, ours = build_teacher(Lesson.of(config), here), CachedTeacher(cache, reader.teacher, here.device)
    alone = replace(here, rank=0, world=1)
    theirs, mine = windows_of(config, alone, groups), windows_of(reader, alone, groups)
    # Shards hold 16 texts: what a mean leaves of a vector is bounded by the largest deviation of its layer.
    largest = torch.stack([deviations(cache, kind) for kind in ("queries", "passages")])
    found: dict[str, Any] = {"roundings": 0.0, "relative": 0.0, "cosine": 0.0, "deviation": 0.0}
    for step in range(theirs.steps_per_epoch):
        views = (
            own.window(theirs.window(step).teachers[0], cache.layers),
            ours.window(mine.window(step).teachers[0], cache.layers),
        )
        for part in ("layers", "final"):
            a, b = (getattr(view, part) for view in views)
            assert isinstance(a, VectorFeatures)
            assert (type(b), b.scale) == (VectorFeatures, a.scale)
            rows = slice(0, -1) if part == "layers" else slice(-1, None)
            for x, y, bound_K in ((a.q_KQD, b.q_KQD, largest[0, rows]), (a.p_KPD, b.p_KPD, largest[1, rows])):
                off, length = (x - y).norm(dim=-1), x.norm(dim=-1)
                noise = 1e-5 * length
                found["roundings"] = max(found["roundings"], ((off - noise) / (2**-11 * bound_K[:, None])).max().item())
                found["relative"] = max(found["relative"], (off / length).max().item())
                found["deviation"] = max(found["deviation"], (bound_K[:, None] / length).max().item())
            cosines = [replace(f, scale="cosine").relevance().logits for f in (a, b)]
            found["cosine"] = max(found["cosine"], (cosines[0] - cosines[1]).abs().max().item())
    return found


def deviations(cache: VectorCache, kind: str) -> torch.Tensor:
    """The largest length of a stored deviation, by layer and final state. [K + 1]."""
    paths = [path for path in cache.paths if path.name.startswith(kind)]
    return torch.stack(
        [torch.from_numpy(mapped(path)[0]["deviation"].astype(np.float32)).norm(dim=-1).amax(0) for path in paths]
    ).amax(0)


def mended(config: Config, folder: Path) -> list[str]:
    """Lose a shard and the index, spoil another shard, teach again: the files that were made anew, equal to what they were."""
    paths = [*VectorCache.open(folder).paths]
    before = {path.name: (path.stat().st_mtime_ns, mapped(path)[0]) for path in paths}
    held = {name: {key: np.array(array) for key, array in arrays.items()} for name, (_, arrays) in before.items()}
    lost, spoilt, index = folder / "passages-00001.safetensors", folder / "queries-00000.safetensors", paths[0]
    lost.unlink()
    index.unlink()
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    keep(config, folder, "1,3")
    for path in paths:
        for name, array in mapped(path)[0].items():
            np.testing.assert_allclose(array, held[path.name][name], rtol=2**-10, atol=1e-5)
    return [path.name for path in paths if path.stat().st_mtime_ns != before[path.name][0]]


def on_two_ranks(online: str, folder: str, runs: list[str]) -> dict[str, Any]:
    """Vectors that a sharded teacher gave to two ranks, and the losses of `runs`."""
    with ranks():
        keep(load_config(online), Path(folder), "all", exact=True)
        return {"losses": distil_each(runs)}
