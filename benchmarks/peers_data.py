"""What `benchmarks.peers` trains on: a small collection drawn from a real one, teachers' answers of it, and each step's batch.

Every library is given the same batches in the same order: those that lead-ds draws, with the cached scores or vectors beside.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.config import Config, load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.training.distill import open_inputs, settled
from lead_ds.io.files import write_json
from lead_ds.teachers.teach import teach

OTHERS = 200  # passages that no query of the training groups names
DEV = 100  # queries
TEVATRON_QUERY = 32  # tokens to which Tevatron pads every query, by default
READ: dict[str, dict[str, Any]] = {"dot": {"pooling": "cls", "normalize": False}}  # how the student of a loss is read
QUERY_PROMPT = "Represent this sentence for searching relevant passages: "


def build(folder: Path, source: Path, groups: int, negatives: int, seed: int = 888) -> None:
    """A collection of `groups` training groups of 1 + `negatives` passages, which repeat, and `DEV` dev queries."""
    if (folder / "built.json").exists():
        return
    dataset, generator = Dataset.open(source), random.Random(seed)
    judged = {split: dataset.qrels(split) for split in ("train", "dev")}
    train = generator.sample(sorted(judged["train"]), groups)
    dev = generator.sample(sorted(judged["dev"]), min(DEV, len(judged["dev"])))
    positives = {query: next(iter(judged["train"][query])) for query in train}
    pool = sorted(set(positives.values()))
    rows = []
    for query in train:
        others = [
            passage
            for passage in generator.sample(pool, min(len(pool), negatives + 8))
            if passage not in judged["train"][query]
        ]
        rows.append({"query_id": query, "positives": [positives[query]], "negatives": others[:negatives]})
    known = set(pool) | {passage for query in dev for passage in judged["dev"][query]}
    ids = [
        dataset.corpus.ids[row]
        for row in generator.sample(range(len(dataset.corpus)), min(OTHERS, len(dataset.corpus)))
    ]
    corpus = sorted(known | set(ids))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "corpus.jsonl", _texts(dataset.corpus, corpus))
    _write(folder / "queries.jsonl", _texts(dataset.queries, [*train, *dev]))
    _write(folder / "train.jsonl", rows)
    (folder / "qrels").mkdir(exist_ok=True)
    lines = [f"{q}\t{p}\t{grade}" for q in dev for p, grade in judged["dev"][q].items()]
    (folder / "qrels" / "dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
    write_json(folder / "built.json", {"source": str(source), "groups": groups, "negatives": negatives, "seed": seed})


def _texts(texts: Any, ids: list[str]) -> list[dict[str, str]]:
    found = texts.texts(texts.rows(ids))
    return [{"_id": name, "text": text} for name, text in zip(ids, found, strict=True)]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def student(folder: Path, source: Path) -> None:
    """The student's directory as sentence-transformers has it, and without dropout, so that losses can be compared."""
    if folder.exists():
        return
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(source), max_seq_length=128)
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save(str(part))
    path = part / "config.json"
    shape = json.loads(path.read_text("utf-8"))
    write_json(path, {**shape, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    part.rename(folder)


def plain(folder: Path, source: Path) -> None:
    """The student's transformer alone, for libraries whose sentence-transformers is older than what wrote the student."""
    if folder.exists():
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    path = part / "config.json"
    shape = json.loads(path.read_text("utf-8"))
    write_json(path, {**shape, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    part.rename(folder)


def configuration(work: Path, models: Path, loss: str, size: dict[str, Any], begun: str, **more: Any) -> dict[str, Any]:
    """The run of a loss, as a configuration's tree. size: steps, batch, length, lr; more: sections, laid over it."""
    reranker = {"kind": "cross_encoder", "path": str(models / "reranker-l12"), "max_length": 2 * size["length"]}
    lengths = {"query_length": size["length"], "passage_length": size["length"]}
    dense = {"kind": "dual_encoder", "path": str(models / "bge-small"), "pooling": "cls", "normalize": True, **lengths}
    off: dict[str, Any] = {name: {"weight": 0.0} for name in ("contrastive", "response", "layer")}
    losses: dict[str, dict[str, Any]] = {
        "kl": {"response": {"weight": 0.0025, "student_temperature": 0.05}},  # DistillKLDivLoss multiplies by 0.05 ** 2
        "margin": {"margin_mse": {"weight": 1.0, "teacher_scale": 0.05}},
        "embed": {"embedding": {"weight": 1.0, "into": "same", "distance": "cosine", "of": ["queries", "positives"]}},
        "labels": {"contrastive": {"weight": 1.0, "temperature": 0.05}},
        "colbert": {"response": {"weight": 1.0}},
        "dot": {"contrastive": {"weight": 1.0, "temperature": 1.0}},
    }
    tree: dict[str, Any] = {
        "seed": 888,
        "student": {"kind": "dual_encoder", "path": begun, **lengths},
        "data": {"path": str(work / "data"), "negatives": 0 if loss == "embed" else size["negatives"]},
        "losses": {**off, **losses[loss]},
        "train": {
            "steps": size["steps"],
            "batch_size": size["batch"] * (3 if loss == "embed" else 1),
            "lr": size["lr"],
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "clip": 1.0,
            "log_every": 1,
            "save_every": 1_000_000,
            "evaluate_every": 0,
        },
        "evaluation": {"split": None},
        "monitor": {"tensorboard": False, "csv": False},
    }
    tree["data"]["mask_duplicates"] = False  # no other library knows of them
    if loss not in ("labels", "dot"):
        tree["teacher"] = {**dense, "query_prompt": QUERY_PROMPT} if loss == "embed" else reranker
        tree["teacher"]["dtype"] = "fp32"
    if loss == "embed":
        tree["train"]["steps"] = size["steps"] // 3
    if loss == "dot":
        tree["student"] |= {**READ["dot"], "query_length": TEVATRON_QUERY}
    if loss == "colbert":
        tree["student"] = {"kind": "colbert", "path": begun}
    for name, section in more.items():
        tree[name] = {**tree.get(name, {}), **section}
    return tree


def taught(work: Path, tree: dict[str, Any], loss: str) -> dict[str, Any]:
    """The same with its teacher in a cache, which is made where it is not there yet."""
    if "teacher" not in tree:
        return tree
    kept = work / ("vectors" if loss == "embed" else "scores")
    if not (kept / "done").exists():
        config = load_config(written(work / "teach.yaml", {**tree, "output": str(work / "taught")}))
        teach(config, kept, vectors="final" if loss == "embed" else None, quiet=True)
        (kept / "done").touch()
    return {**tree, "teacher": {"kind": "cached", "path": str(kept)}}


def written(path: Path, tree: dict[str, Any]) -> Path:
    """A configuration's file: JSON, which is YAML."""
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path


def batches(path: Path, out: Path) -> None:
    """Each step's batch of a configuration as other libraries take it: a query, its passages, and what the teacher says."""
    config: Config = settled(load_config(path))
    corpus, queries = (Dataset.open(config.data.path).corpus, Dataset.open(config.data.path).queries)
    with ranks() as here, out.open("w", encoding="utf-8") as file:
        windows = open_inputs(config, here)[2]
        for step in range(config.train.steps):
            window = windows.window(step)
            group = len(window.passage_ids) // len(window.query_ids)
            texts = corpus.texts(corpus.rows(window.passage_ids))
            labels: list[Any] = [None] * len(window.query_ids)
            found = window.teachers[0][0].looked_up if window.teachers else None
            if found is not None and "relevance" in found:
                labels = found["relevance"][..., -1].double().tolist()
            elif found is not None:
                q_BD, p_BND = found["queries"][-1], found["passages"][-1].unflatten(0, (-1, group))
                labels = np.concatenate([q_BD[:, None], p_BND], 1).astype(float).tolist()
            for place, query in enumerate(queries.texts(queries.rows(window.query_ids))):
                passages = texts[place * group : (place + 1) * group]
                file.write(json.dumps({"query": query, "passages": passages, "label": labels[place]}) + "\n")
