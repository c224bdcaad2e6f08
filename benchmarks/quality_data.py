"""The collections of the quality benchmark: one training collection joined from several, and test collections.

A test collection is a set's test queries over its judged passages and as many others, drawn by a seed, as its size
allows for. It is a whole corpus where it is no larger.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.texts import Texts
from lead_ds.io.files import atomic, read_json, write_json
from lead_ds.retrieval.mine import MineSettings, mine
from lead_ds.retrieval.rescore import open_teacher, rescore

DONE = "built.json"

TRAINED_ON = ("squadshifts", "medquad", "tldr")
OTHERS = ("scifact", "cranfield", "vaswani")


@dataclass(frozen=True)
class Size:
    """How much is drawn of each set: training queries and dev queries; passages of a test corpus, 0 for all."""

    train: int
    dev: int
    passages: int
    negatives: int
    seed: int = 888


def build_training(folder: Path, sets: Mapping[str, Path], size: Size) -> Path:
    """One collection of all sets, ids prefixed by the set's name, with BM25's hard negatives of `size.train` queries each."""
    if built(folder, size, sets):
        return folder
    corpus, queries = [], []
    qrels: dict[str, list[tuple[str, str, int]]] = {"train": [], "dev": []}
    for name, path in sets.items():
        dataset = Dataset.open(path)
        corpus += records(dataset.corpus, range(len(dataset.corpus)), f"{name}:")
        for split, count in (("train", size.train), ("dev", size.dev)):
            judged = dataset.qrels(split)
            chosen = random.Random(f"quality {size.seed} {name} {split}").sample(
                sorted(judged), min(count, len(judged))
            )
            queries += records(dataset.queries, dataset.queries.rows(chosen).tolist(), f"{name}:")
            qrels[split] += [
                (f"{name}:{query}", f"{name}:{passage}", grade)
                for query in chosen
                for passage, grade in judged[query].items()
            ]
    write_collection(folder, corpus, queries, qrels)
    settings = MineSettings(number=size.negatives, depth=10 * size.negatives)
    mine("bm25", Dataset.open(folder), folder / "train.jsonl", "train", settings, quiet=True)
    keep_full(folder / "train.jsonl", size.negatives)
    write_json(folder / DONE, facts(size, sets))
    return folder


def build_texts(path: Path, sets: Mapping[str, Path], seed: int = 888) -> None:
    """Every training query, and of each set at most 12,000 sentences of its passages, two of each: texts on lines."""
    generator, texts = random.Random(seed), []
    for folder in sets.values():
        dataset = Dataset.open(folder)
        texts += dataset.queries.texts(dataset.queries.rows(sorted(dataset.qrels("train"))))
        sentences = []
        for start in range(0, len(dataset.corpus), 1000):
            for passage in dataset.corpus.texts(range(start, min(start + 1000, len(dataset.corpus)))):
                parts = [part.split() for part in re.split(r"(?<=[.!?])\s+", passage)]
                parts = [part for part in parts if len(part) >= 5]
                sentences += [" ".join(part[:24]) for part in generator.sample(parts, min(2, len(parts)))]
        texts += generator.sample(sentences, min(12_000, len(sentences)))
    with atomic(path) as temporary:
        temporary.write_text("".join(" ".join(text.split()) + "\n" for text in texts if text.strip()), "utf-8")


def mine_by(model: Path, folder: Path, negatives: int, reranker: Path | None = None) -> None:
    """A model's negatives for a training collection, drawn from the first 50 that it finds, in the place of those it has.

    reranker: scores the first 16 again. Those that it ranks with the positives are left out, and the rest is drawn from
    evenly over the range of its scores.
    """
    dataset = Dataset.open(folder)
    settings = MineSettings(number=negatives, depth=min(50, len(dataset.corpus)), sample="random")
    rescored = None
    if reranker is not None:
        settings = MineSettings(number=negatives, depth=min(16, len(dataset.corpus)), margin=0.0, sample="stratified")
        teacher = open_teacher(str(reranker), ["kind=cross_encoder", "max_length=144", "dtype=bf16"])
        rescored = partial(rescore, teacher, dataset, folder=folder / "train.scores")
    mine(model, dataset, folder / "train.jsonl", "train", settings, rescored=rescored)
    keep_full(folder / "train.jsonl", negatives)


def keep_full(groups: Path, negatives: int) -> None:
    """Leave out groups that lack negatives: what is drawn at random in their place would differ from seed to seed."""
    lines = groups.read_text("utf-8").splitlines(keepends=True)
    with atomic(groups) as temporary:
        temporary.write_text("".join(x for x in lines if len(json.loads(x)["negatives"]) == negatives), "utf-8")


def build_test(folder: Path, name: str, path: Path, size: Size, split: str = "test") -> Path:
    """The queries of a set's split over `size.passages` of its passages, every judged one among them."""
    if built(folder, size, {name: path}):
        return folder
    dataset = Dataset.open(path)
    judged = dataset.qrels(split)
    rows: Sequence[int] = range(len(dataset.corpus))
    if 0 < size.passages < len(dataset.corpus):
        needed = {int(row) for found in judged.values() for row in dataset.corpus.rows(list(found))}
        others = [row for row in rows if row not in needed]
        more = random.Random(f"quality {size.seed} {name} corpus").sample(others, max(0, size.passages - len(needed)))
        rows = sorted(needed | set(more))
    chosen = list(judged)
    qrels = {split: [(query, passage, grade) for query in chosen for passage, grade in judged[query].items()]}
    queries = records(dataset.queries, dataset.queries.rows(chosen).tolist(), "")
    write_collection(folder, records(dataset.corpus, rows, ""), queries, qrels)
    write_json(folder / DONE, facts(size, {name: path}))
    return folder


def built(folder: Path, size: Size, sets: Mapping[str, Path]) -> bool:
    """Whether an earlier call wrote the same."""
    path = folder / DONE
    return path.exists() and read_json(path, "delete the folder") == facts(size, sets)


def facts(size: Size, sets: Mapping[str, Path]) -> dict[str, Any]:
    """What decides a collection."""
    return {**asdict(size), "sets": sorted(sets)}


def records(texts: Texts, rows: Iterable[int], prefix: str) -> list[dict[str, str]]:
    """BEIR records of some rows; a title stays before its text, as models read it."""
    rows = list(rows)
    return [{"_id": prefix + texts.ids[row], "text": text} for row, text in zip(rows, texts.texts(rows), strict=True)]


def without_dropout(model: Path, folder: Path) -> Path:
    """A copy of a model whose configuration has no dropout: half of a CPU's training time, and noise between arms."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place) / folder.name
        shutil.copytree(model, made)
        config = read_json(made / "config.json", "name a Hugging Face directory")
        config |= {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], (int, float))}
        write_json(made / "config.json", config)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
    return folder


def write_collection(
    folder: Path,
    corpus: list[dict[str, str]],
    queries: list[dict[str, str]],
    qrels: Mapping[str, list[tuple[str, str, int]]],
) -> None:
    """Write BEIR's layout."""
    for name, rows in (("corpus.jsonl", corpus), ("queries.jsonl", queries)):
        with atomic(folder / name) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    for split, judgements in qrels.items():
        with atomic(folder / "qrels" / f"{split}.tsv") as temporary:
            lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judgements)]
            temporary.write_text("\n".join(lines) + "\n", "utf-8")
