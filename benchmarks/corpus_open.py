"""How fast a big corpus.jsonl opens, what it costs in memory, and how fast its texts are read at random.

    python benchmarks/corpus_open.py [--passages 1000000] [--words 55] [--folder DIR]

Generates the corpus (MS MARCO's passages average about 55 words). Then measures, each in a process of its own: building
the index, opening it again, and reading texts and looking up ids in random order. Memory is what the process itself
holds (anonymous pages); pages of the mapped files are the system's to take back and are shown beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def generate(path: Path, passages: int, words: int) -> None:
    """Write `passages` lines of about `words` words each."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(passages):
            text = " ".join(rng.choices(vocabulary, k=rng.randint(words // 2, words * 3 // 2)))
            file.write(json.dumps({"_id": str(i), "title": "", "text": text}) + "\n")


def memory() -> dict[str, float]:
    """MiB that this process holds: its own pages, and mapped files."""
    fields = {"RssAnon": "own", "RssFile": "mapped"}
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if ":" in line)
    return {fields[name]: int(value.split()[0]) / 1024 for name, value in pairs if name in fields}


def measure_open(path: Path) -> dict[str, Any]:
    """Open the corpus: seconds and memory growth."""
    from lead_ds.data.collections.texts import Texts

    before, start = memory(), time.perf_counter()
    corpus = Texts.open(path, "corpus")
    seconds = time.perf_counter() - start
    after = memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    growth = {name: after[name] - before[name] for name in before}
    return {"passages": len(corpus), "seconds": seconds, "peak": peak, **growth}


def measure_reads(path: Path, reads: int = 100_000) -> dict[str, Any]:
    """Texts per second by random row, ids per second in one bulk lookup, and memory growth."""
    from lead_ds.data.collections.texts import Texts

    corpus = Texts.open(path, "corpus")
    before = memory()
    rng = random.Random(1)
    rows = [rng.randrange(len(corpus)) for _ in range(reads)]
    start = time.perf_counter()
    for row in rows:
        corpus.text(row)
    texts = reads / (time.perf_counter() - start)
    names = [corpus.ids[row] for row in rows]
    start = time.perf_counter()
    found = corpus.rows(names)
    lookups = reads / (time.perf_counter() - start)
    assert found.tolist() == rows
    after = memory()
    return {"texts": texts, "lookups": lookups, **{name: after[name] - before[name] for name in before}}


def _call(function: Callable[[Path], dict[str, Any]], path: Path, pipe: Connection) -> None:
    pipe.send(function(path))


def apart(function: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """`function(path)` in a fresh process, so that memory is not that of an earlier measurement."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_call, args=(function, path, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    finally:
        process.join()


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=55)
    parser.add_argument("--folder", type=Path, help="where to generate; a temporary folder that is removed by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "corpus.jsonl"
        generate(path, arguments.passages, arguments.words)
        size = path.stat().st_size / 2**20
        built, opened, read = apart(measure_open, path), apart(measure_open, path), apart(measure_reads, path)
        index = sum(file.stat().st_size for file in Path(folder).glob("*.idx")) / 2**20
    try:
        import orjson

        parser_name = f"orjson {orjson.__version__}"
    except ImportError:
        parser_name = "json of the standard library"
    print(f"{built['passages']:,} passages, {size:,.0f} MiB; Python {platform.python_version()}, {parser_name}")
    rate = built["passages"] / built["seconds"]
    print(f"build the index   {built['seconds']:8.2f} s   {rate:,.0f} lines/s, index {index:,.0f} MiB")
    print(f"  memory          {built['own']:8.1f} MiB own, {built['mapped']:,.0f} mapped; peak {built['peak']:,.0f}")
    print(f"open again        {opened['seconds'] * 1e3:8.2f} ms")
    print(f"  memory          {opened['own']:8.1f} MiB own, {opened['mapped']:,.1f} mapped")
    print(f"random texts      {read['texts']:8,.0f} /s")
    print(f"bulk id lookups   {read['lookups']:8,.0f} /s")
    print(f"  memory of both  {read['own']:8.1f} MiB own, {read['mapped']:,.0f} mapped")


if __name__ == "__main__":
    main()
