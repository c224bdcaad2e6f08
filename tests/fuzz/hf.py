"""Readers of `prepare hf`: rows of each kind of local file, a retrieval dataset, and a dataset as the library saves it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lead_ds.prepare.build import prepare
from lead_ds.prepare.hf import open_hf
from tests.fuzz.made import CORPUS, QUERIES, Good, among, files_of, lines

ROWS: list[dict[str, Any]] = [
    {"query": "one", "positive": "x", "negative": "y"},
    {"query": "one", "positive": "z", "negative": "y"},
    {"query": "two", "positive": "y", "negative": "x"},
]
QRELS = ({"query-id": "q1", "corpus-id": "p1", "score": 1}, {"query-id": "q2", "corpus-id": "p2", "score": 2.0})
RETRIEVAL = {
    "corpus/corpus.jsonl": CORPUS,
    "queries/queries.jsonl": QUERIES,
    "qrels/train.jsonl": lines(*QRELS),
}
PLAIN = {
    "train.jsonl": lines(*ROWS),
    "train.json": json.dumps(ROWS).encode(),
    "train.csv": b'query,positive,negative\none,"x, ""y""",y\ntwo,y,x\n',
    "train.tsv": b'query\tpositive\tnegative\none\tx " y\ty\ntwo\ty\tx\n',
}


@functools.cache
def saved() -> Good:
    """As `save_to_disk` writes."""
    import datasets

    datasets.disable_progress_bars()
    return files_of(lambda folder: datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "x")))


@functools.cache
def parquet() -> Good:
    """One file."""
    import datasets

    return files_of(lambda folder: datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet"))


def read(name: str) -> Callable[[Path], None]:
    """Prepare what lies in a folder under a name."""

    def run(folder: Path) -> None:
        import datasets

        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        prepare(open_hf(str(folder / name)), folder / "out", shown=False)

    return run


def readers() -> list[tuple[str, Callable[[], bytes] | tuple[bytes, ...], Callable[[Path], object], bool, float]]:
    """Of each file of each kind of dataset: name, good bytes, how it is read, whether it is JSON, and its share."""
    found: list[Any] = []
    for file, content in PLAIN.items():
        found.append((f"hf: {file}", (content,), among({}, file, read(file)), ".json" in file, 0.2))
    for file, content in RETRIEVAL.items():
        put = {f"data/{name}": data for name, data in RETRIEVAL.items()}
        found.append((f"hf: {file}", (content,), among(put, f"data/{file}", read("data")), True, 0.2))
    found.append(
        (
            "hf: train.parquet",
            lambda: parquet()["train.parquet"],
            among({}, "train.parquet", read("train.parquet")),
            False,
            0.1,
        )
    )
    for file in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        good = functools.partial(lambda name: saved()[name], f"x/{file}")
        found.append((f"hf, saved: {file}", good, among(saved, f"x/{file}", read("x")), file.endswith(".json"), 0.1))
    return found
