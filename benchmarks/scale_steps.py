"""The steps of `benchmarks.scale`: each a process of its own, so that its time and memory are its own.

    python -m benchmarks.scale_steps STEP SIZE FOLDER

prints what it found as JSON. Called by `benchmarks.scale`, which measures.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import scale_data

Facts = dict[str, Any]
WINDOWS = 10_000  # data alone
READ = 2000  # windows from caches
ASKED = 1000  # queries of an index
INDEXES = {"pq": "IVF1024,PQ32", "sq8": "IVF1024,SQ8", "hnsw": "HNSW16", "binary": "IVF1024"}
SMALL = {
    "pq": "IVF16,PQ32x4",
    "sq8": "IVF16,SQ8",
    "hnsw": "HNSW16",
    "binary": "IVF16",
}  # fewer vectors than train the above
TRAINS = 39 * 1024
TIMED_STEPS = 5  # of a student of MiniLM's shape
STUDENT: Facts = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


def own() -> float:
    """MiB of this process's own memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def config_of(folder: Path, *overrides: str) -> Any:
    """The generated run's configuration."""
    from lead_ds.config import load_config

    return load_config(folder / "run.yaml", list(overrides))


def generate(size: int, folder: Path) -> Facts:
    """The collection."""
    scale_data.collection(folder, size)
    return {}


def index(size: int, folder: Path) -> Facts:
    """Open corpus, queries and groups for the first time: their indexes are built."""
    from lead_ds.data.groups.open import open_groups

    return {"groups": len(open_groups(config_of(folder).data))}


def open_again(size: int, folder: Path) -> Facts:
    """Open them again, as every rank does; the first window, and many more: data alone."""
    from lead_ds.engine.distributed.ranks import ranks
    from lead_ds.engine.training.distill import open_inputs

    config = config_of(folder, "losses.layer.weight=0", "losses.response.weight=0", "train.steps=100000")
    with ranks() as here:
        before, started = own(), time.perf_counter()
        batches = open_inputs(config, here)[2]
        opened, first = time.perf_counter() - started, time.perf_counter()
        batches.window(0)
        first = time.perf_counter() - first
        count = min(WINDOWS, batches.steps_per_epoch * 4)
        memory, spans, rate = flat(batches, 1, count)
    grown = {"own_of_rank": memory[0] - before, "own_growth": memory[-1] - memory[0]}
    return {"open_seconds": opened, "first_window": first, "windows": count, "rate": rate, "slowdown": spans, **grown}


def flat(batches: Any, start: int, count: int) -> tuple[list[float], float, float]:
    """Own memory at the beginning and the end of `count` windows; time of the last fifth over the second; windows a second.

    By this process's processor time. The first fifth meets pages that nobody has read yet.
    """
    part = max(1, count // 5)
    spans, memory = [], [own()]
    for fifth in range(5):
        begun = time.process_time()
        for step in range(start + fifth * part, start + (fifth + 1) * part):
            batches.window(step)
        spans.append(time.process_time() - begun)
    memory.append(own())
    return memory, spans[-1] / spans[1], part * 5 / sum(spans)


def tokens(size: int, folder: Path) -> Facts:
    """The student's tokens of all texts."""
    from lead_ds.data.groups.by_id import IdGroups
    from lead_ds.data.groups.open import open_groups
    from lead_ds.data.tokens.cache import TokenCache
    from lead_ds.models.load import load_text

    config = config_of(folder)
    groups = open_groups(config.data)
    assert isinstance(groups, IdGroups)
    TokenCache.open(str(folder / "tokens"), groups, load_text(config.student), rank=0)
    return {"texts": len(groups.queries) + len(groups.corpus)}


def read_tokens(size: int, folder: Path) -> Facts:
    """Windows of kept tokens."""
    return read(folder, f"data.token_cache={folder / 'tokens'}", "losses.layer.weight=0", "losses.response.weight=0")


def teach(size: int, folder: Path) -> Facts:
    """The teacher's relevance of every group."""
    from lead_ds.teachers.teach import teach as run

    return {"groups": len(run(config_of(folder), folder / "taught", quiet=True))}


def read_teach(size: int, folder: Path) -> Facts:
    """Windows of kept relevance and tokens."""
    return read_taught(folder, "taught")


def teach_vectors(size: int, folder: Path) -> Facts:
    """The teacher's vectors of every text that the groups name."""
    from lead_ds.teachers.teach import teach as run

    return {"groups": len(run(config_of(folder), folder / "vectors", vectors="last:2", quiet=True))}


def read_vectors(size: int, folder: Path) -> Facts:
    """Windows of kept vectors and tokens."""
    return read_taught(folder, "vectors")


def read_taught(folder: Path, kept: str) -> Facts:
    """`read`, of a teacher's cache beside tokens."""
    teacher = ["teacher.kind=cached", f"teacher.path={folder / kept}", "losses.layer.select=last"]
    return read(folder, f"data.token_cache={folder / 'tokens'}", *teacher)


def read(folder: Path, *overrides: str) -> Facts:
    """How fast windows are read, whether time and memory stay flat, and how often a student of MiniLM's shape would ask."""
    from lead_ds.engine.distributed.ranks import ranks
    from lead_ds.engine.training.distill import open_inputs

    with ranks() as here:
        before, started = own(), time.perf_counter()
        batches = open_inputs(config_of(folder, *overrides, "train.steps=20000"), here)[2]
        opened = time.perf_counter() - started
        count = min(READ, batches.steps_per_epoch * 4)
        memory, slower, rate = flat(batches, 0, count)
        steps = student_rate(batches)
    grown = {"own_of_rank": memory[0] - before, "own_growth": memory[-1] - memory[0]}
    return {
        "open_seconds": opened,
        "windows": count,
        "rate": rate,
        "student_rate": steps,
        "times_student": rate / steps,
        "slowdown": slower,
        **grown,
    }


def student_rate(batches: Any) -> float:
    """Steps a second of processor time: forward and backward of six layers, 384 wide, over windows' tokens."""
    import torch
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**STUDENT, vocab_size=scale_data.VOCABULARY + len(scale_data.SPECIAL)))
    spans = []
    for step in range(TIMED_STEPS):
        batch = batches.window(step).student[0]
        begun = time.process_time()
        states = [model(table["input_ids"], table["attention_mask"]).last_hidden_state[:, 0] for table in batch.tables]
        torch.logsumexp(states[0] @ states[1].T, 1).mean().backward()
        spans.append(time.process_time() - begun)
    return 1 / statistics.median(spans)


def encode(size: int, folder: Path) -> Facts:
    """All passages by the student, into files; the rate of each shard beside the time when it was written."""
    import torch

    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.retrieval.encode import Encoding, Stored, encode_to
    from lead_ds.retrieval.evaluate import open_encoder

    scorer, encoder = open_encoder(folder / "student", "cpu")
    out, texts = folder / "encoded", Dataset.open(folder).corpus
    there = set(out.glob("vectors-*.npy"))
    torch.set_num_threads(1)
    begun = time.process_time()
    vectors = encode_to(out, scorer.embed, encoder, texts, {"name": "generated"}, Encoding(64), Stored(shard_rows=8192))
    seconds = time.process_time() - begun
    fresh = [i for i in range(vectors.shards) if vectors.path(i) not in there]
    spans = np.diff([vectors.path(i).stat().st_mtime for i in fresh])
    half = len(spans) // 2
    slower = float(np.median(spans[half:]) / np.median(spans[:half])) if half else 1.0
    return {"slowdown": slower, "rate": sum(len(vectors.rows(i)) for i in fresh) / seconds}


def bare(size: int, folder: Path) -> Facts:
    """The model alone, over batches of the same texts that were put together beforehand; and with its tokenizer.

    The tokenizer as transformers' documents call it, 64 texts a batch. `at_512`: both over the larger batches that encode makes
    of short texts. Medians of five turns.
    """
    import torch

    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.retrieval.evaluate import open_encoder

    torch.set_num_threads(1)
    scorer, encoder = open_encoder(folder / "student", "cpu")
    texts = Dataset.open(folder).corpus
    count = min(20_000, len(texts))
    strings = texts.texts(range(count))
    rates: dict[str, list[float]] = {}
    for _ in range(5):
        for suffix, batch in (("", 64), ("_at_512", 512)):
            times = [time.process_time()]
            tokens = [
                encoder.tokenizer(
                    strings[start : start + batch], padding=True, truncation=True, max_length=32, return_tensors="pt"
                )
                for start in range(0, count, batch)
            ]
            times.append(time.process_time())
            with torch.no_grad():
                for some in tokens:
                    scorer.backbone(some["input_ids"], some["attention_mask"]).last_hidden_state.mean(1).numpy()
            times.append(time.process_time())
            rates.setdefault("rate_of_model" + suffix, []).append(count / (times[2] - times[1]))
            rates.setdefault("rate" + suffix, []).append(count / (times[2] - times[0]))
    return {name: statistics.median(found) for name, found in rates.items()}


def make_vectors(size: int, folder: Path) -> Facts:
    """Vectors to index, of floats and of signs, and what is nearest to each query."""
    import torch

    from lead_ds.retrieval.exact import exact_search
    from lead_ds.retrieval.vectors import Vectors

    scale_data.vectors(folder / "floats", size)
    scale_data.vectors(folder / "signs", size, "ubinary")
    # Each block draws the same clusters: a block that is not indexed asks.
    queries = scale_data.drawn(1 << 20, ASKED)
    np.save(folder / "queries.npy", queries)
    blocks = Vectors.open(folder / "floats").blocks()
    np.save(folder / "nearest.npy", exact_search(torch.from_numpy(queries), blocks, 10)[1].numpy())
    return {}


def build(kind: str, size: int, folder: Path) -> Facts:
    """An index."""
    from lead_ds.retrieval.index import build_index
    from lead_ds.retrieval.vectors import Vectors

    source = Vectors.open(folder / ("signs" if kind == "binary" else "floats"))
    finer = Vectors.open(folder / "floats") if kind == "binary" else None
    factory = (INDEXES if size >= TRAINS else SMALL)[kind]
    build_index(source, folder / f"index-{kind}", factory, quiet=True, rescore=finer)
    bytes_ = sum(file.stat().st_size for file in (folder / f"index-{kind}").glob("*") if file.is_file())
    return {"factory": factory, "megabytes": bytes_ / 1e6}


def search(kind: str, size: int, folder: Path) -> Facts:
    """The index asked through lead-ds and through FAISS alone, in turns: recall, times."""
    import faiss

    from lead_ds.retrieval.index import INDEX, Index
    from lead_ds.retrieval.small import quantise

    faiss.omp_set_num_threads(1)
    queries, nearest = np.load(folder / "queries.npy"), np.load(folder / "nearest.npy")
    before, started = own(), time.perf_counter()
    how: Facts = {} if kind == "hnsw" else {"nprobe": 32}
    how |= {"ef_search": 64} if kind == "hnsw" else {}
    opened = Index.open(folder / f"index-{kind}", **how)
    seconds, grown = time.perf_counter() - started, own() - before
    path = str(folder / f"index-{kind}" / INDEX)
    theirs: Any
    if kind == "binary":
        theirs = faiss.read_index_binary(path)
        theirs.nprobe = 32
        asked, deep = quantise(queries, "ubinary"), 40
    else:
        theirs, asked, deep = faiss.read_index(path), queries, 10
        faiss.ParameterSpace().set_index_parameter(
            theirs, "efSearch" if kind == "hnsw" else "nprobe", 64 if kind == "hnsw" else 32
        )
    spans: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3):
        for name, ask in (("ours", lambda: opened.search(queries, 10)), ("theirs", lambda: theirs.search(asked, deep))):
            begun = time.process_time()
            found = ask()[1]
            spans[name].append(time.process_time() - begun)
            if name == "ours":
                recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, nearest, strict=True)])
    ours, faiss_alone = (statistics.median(spans[name]) for name in ("ours", "theirs"))
    return {
        "open_seconds": seconds,
        "own_of_rank": grown,
        "recall": float(recall),
        "rate": len(queries) / ours,
        "of_faiss": faiss_alone / ours,
    }


def mine(size: int, folder: Path) -> Facts:
    """Hard negatives for every query."""
    from lead_ds.data.collections.dataset import Dataset
    from lead_ds.retrieval.mine import mine as run

    mined = run(folder / "student", Dataset.open(folder), folder / "mined.jsonl", quiet=False)
    return {"queries": mined.queries, "negatives": mined.negatives}


def evaluate(size: int, folder: Path) -> Facts:
    """The measures of every query, a thousand passages deep."""
    from lead_ds.retrieval.evaluate import evaluate_path

    return {"queries": size // scale_data.GROUP_OF, "measures": evaluate_path(folder / "student", folder)}


def pipeline(size: int, folder: Path) -> Facts:
    """The stages of a recipe over all of it."""
    from lead_ds.pipeline.run import run_pipeline

    tree = run_pipeline(folder / "run.yaml")
    return {"stages": {stage["stage"]: stage["seconds"] for stage in tree["stages"]}}


STEPS: dict[str, Callable[[int, Path], Facts]] = {
    function.__name__: function
    for function in (
        *(generate, index, open_again, tokens, read_tokens, teach, read_teach, teach_vectors, read_vectors),
        *(encode, bare, make_vectors, mine, evaluate, pipeline),
    )
}
STEPS |= {f"build_{kind}": partial(build, kind) for kind in INDEXES}
STEPS |= {f"search_{kind}": partial(search, kind) for kind in INDEXES}


if __name__ == "__main__":
    result = STEPS[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
    print("\n" + json.dumps(result))
