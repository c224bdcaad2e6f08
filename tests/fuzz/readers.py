"""The readers that are fuzzed: what a good file is, and how it is read as far as the program ever reads it."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lead_ds.config import Config, load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_qrels, read_run
from lead_ds.data.collections.texts import Kind, Texts
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught import relevance
from lead_ds.engine.distributed.deepspeed_files import student_deepspeed_config
from lead_ds.errors import LeadError
from lead_ds.io import shards
from lead_ds.io.mapped import read_arrays, write_arrays
from lead_ds.prepare.beir import open_beir
from lead_ds.prepare.build import prepare
from lead_ds.prepare.manifest import read_manifest
from lead_ds.prepare.plain_rows import plain_rows
from lead_ds.retrieval.encode import MANIFEST
from lead_ds.retrieval.evaluate import evaluate_run
from lead_ds.retrieval.vectors import IDS, Vectors
from lead_ds.settings.data import DataConfig
from tests.fuzz import hf, made
from tests.fuzz.made import CORPUS, QUERIES, among, files_of, lines


@dataclass(frozen=True)
class Reader:
    """Good files of one kind, and how they are read: the file of a folder that is the reader's own.

    records: whether a file is JSON, or lines of it, whose values are worth exchanging for others. share: of all inputs,
    less where one takes long.
    """

    name: str
    good: tuple[bytes, ...] | Callable[[], bytes]
    read: Callable[[Path], object]
    records: bool = False
    share: float = 1.0

    @property
    def seeds(self) -> tuple[bytes, ...]:
        """The good files."""
        return self.good if isinstance(self.good, tuple) else (self.good(),)


GROUPS = (
    lines(
        {"query_id": "q1", "positives": ["p1"], "negatives": ["p2", "p3"], "scores": {"p1": 2.5, "p2": 1}},
        {"query_id": "q2", "positives": ["p2", "p4"], "negatives": []},
    ),
    lines(
        {
            "query_id": "1",
            "query": "one",
            "positive_passages": [{"docid": "a", "title": "t", "text": "x"}],
            "negative_passages": [{"docid": "b", "text": "y"}, {"docid": "c", "title": None, "text": "z"}],
        }
    ),
    lines(
        {
            "query": "one",
            "pos": ["x"],
            "neg": ["y", "z"],
            "pos_scores": [1.0],
            "neg_scores": [0.5, 0.1],
            "prompt": "p ",
        },
        {"query": "two", "pos": ["y", "w"], "neg": []},
    ),
    lines({"anchor": "one", "positive": "x", "negative": "y"}, {"anchor": "two", "positive": "y", "negative": "z"}),
    lines({"anchor": "one", "positive": "x", "negative": "y", "label": [1.0, 0.5]}),
    lines({"sentence1": "one", "sentence2": "x", "label": 1}, {"sentence1": "one", "sentence2": "y", "label": 0}),
    lines({"query": "one", "positives": ["x"], "negatives": ["y"], "scores": [1, 0.5]}),
)
QRELS = b"query-id\tcorpus-id\tscore\nq1\tp1\t1\nq1\tp2\t0\nq2\tp2\t2\n"
RUN = b"q1 Q0 p1 1 2.5 tag\nq1 Q0 p2 2 1.25 tag\nq2 Q0 p2 1 0.5 tag\n"
YAML = b"""seed: 888
teacher: {kind: cross_encoder, path: a}
student: {kind: dual_encoder, path: b, query_length: 32}
data: &data {path: d, negatives: 7}
losses:
  response: {weight: 3.0}
  layer: {weight: 1.0, select: random, k: 5}
train: {steps: 10, lr: 5.0e-5, in_batch: global}
output: runs/x
"""
DEEPSPEED = (
    b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}',
    b'{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "wall_clock_breakdown": true}',
)


def text_file(kind: Kind) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        texts = Texts.open(path, kind)
        texts.texts(range(len(texts)))
        ids = list(texts.ids)
        assert texts.rows(ids).tolist() == list(range(len(ids)))
        texts.asking(texts, np.arange(len(ids)))

    return read


def groups(path: Path) -> None:
    for name, content in (("corpus.jsonl", CORPUS), ("queries.jsonl", QUERIES)):
        (path.parent / name).write_bytes(content)
    opened = open_groups(DataConfig(path=str(path.parent), train=path.name, negatives=1))
    for row in range(min(len(opened), 8)):
        opened.draw(row, 0, 0)
        opened.listed(row)
        opened.pool(row)
        opened.offered(row)


def judged(path: Path) -> None:
    evaluate_run({"q1": {"p1": 1.0}, "q2": {"p1": 1.0}}, read_qrels(path), ["nDCG@10"])


def run(path: Path) -> None:
    evaluate_run(read_run(path), {"q1": {"p1": 1}, "q2": {"p2": 1}}, ["nDCG@10", "RR@10"])


PLAIN = Config.model_validate(
    {
        "teacher": {"kind": "cross_encoder", "path": "a"},
        "student": {"kind": "dual_encoder", "path": "b"},
        "data": {"path": "d"},
        "train": {"steps": 1},
        "output": "o",
    }
)


def deepspeed(path: Path) -> None:
    student_deepspeed_config(str(path), PLAIN.train, PLAIN.monitor, Path(PLAIN.output), torch.float32)


def beir(pack: str) -> bytes:
    """A BEIR dataset as an archive."""
    files = {"x/corpus.jsonl": CORPUS, "x/queries.jsonl": QUERIES, "x/qrels/test.tsv": QRELS, "../../out.tsv": QRELS}
    out = io.BytesIO()
    if pack == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content)
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if pack == "tgz" else "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def archive(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        packed = path.rename(path.with_name(name))
        prepare(open_beir(packed), path.parent / "out", shown=False)
        Dataset.open(path.parent / "out").qrels("test")

    return read


def vectors(part: str) -> tuple[bytes, Callable[[Path], object]]:
    """The good bytes of one file of a folder of vectors, and how the folder is read."""
    array = io.BytesIO()
    np.save(array, np.arange(12, dtype=np.float32).reshape(4, 3))
    manifest = {
        "version": 1,
        "model": {},
        "kind": "corpus",
        "prompt": "",
        "length": 8,
        "count": 4,
        "shard_rows": 4,
        "data": "x",
        "dtype": "float32",
    }
    good = {MANIFEST: json.dumps(manifest).encode(), IDS: b"a\nb\nc\nd\n", "vectors-00000.npy": array.getvalue()}

    def read(path: Path) -> None:
        for name, content in good.items():
            (path.parent / name).write_bytes(path.read_bytes() if name == part else content)
        opened = Vectors.open(path.parent, verify=False)
        assert len(opened.ids()) == len(opened)
        for block in opened.blocks():
            np.asarray(block, np.float32).sum()

    return good[part], read


def tensors() -> bytes:
    """A shard of a teacher's cache."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        arrays = relevance.shard_arrays([np.array([3, 1]), np.array([2])], np.ones((3, 2), np.float32))
        shards.save_arrays(path, arrays, "cache")
        return path.read_bytes()


def kept() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_arrays(Path(folder) / "x", {"size": 3}, {"a": np.arange(5), "b": np.ones(3, np.float32)})
        return (Path(folder) / "x").read_bytes()


MODEL = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json")
MODEL += ("lead_ds.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def inside(
    kind: str,
    make: Callable[[Path], object],
    read: Callable[[Path], object],
    names: tuple[str, ...] = (),
    share: float = 1,
) -> list[Reader]:
    """A reader for each file that `make` writes."""
    files = files_of(make)
    return [
        Reader(f"{kind}: {name}", (files[name],), among(files, name, read), name.endswith(".json"), share)
        for name in names or files
    ]


VECTORS = {part: vectors(part) for part in (MANIFEST, IDS, "vectors-00000.npy")}
READERS = {
    reader.name: reader
    for reader in (
        Reader("corpus", (CORPUS, b"\xef\xbb\xbf" + CORPUS), text_file("corpus"), True),
        Reader("queries", (QUERIES,), text_file("queries"), True),
        Reader(
            "gzipped", (gzip.compress(CORPUS, mtime=0),), lambda path: text_file("corpus")(path.rename(f"{path}.gz"))
        ),
        Reader("groups", GROUPS, groups, True),
        Reader("groups of judgements", (QRELS,), lambda path: groups(path.rename(f"{path}.tsv"))),
        Reader("qrels", (QRELS, b"q1 0 p1 1\nq2 0 p2 0\n"), judged),
        Reader("run", (RUN,), run),
        Reader("configuration", (YAML,), load_config),
        Reader("deepspeed", DEEPSPEED, deepspeed, True),
        Reader(
            "tsv", (b'_id\ttext\tlabel\n1\tx " y\t1\n2\tz\t0\n',), lambda p: list(plain_rows([p.rename(f"{p}.tsv")]))
        ),
        Reader("csv", (b'_id,text\n1,"x, ""y"""\n2,z\n',), lambda p: list(plain_rows([p.rename(f"{p}.csv")]))),
        Reader(
            "prepared",
            (b'{"version": 1, "sources": [], "files": {}}',),
            lambda path: read_manifest(path.rename(path.with_name("prepare.json")).parent),
            True,
        ),
        Reader("zip", (beir("zip"),), archive("x.zip")),
        Reader("tar", (beir("tar"),), archive("x.tar")),
        Reader("tgz", (beir("tgz"),), archive("x.tgz")),
        *(Reader(f"vectors: {part}", (good,), read, part == MANIFEST) for part, (good, read) in VECTORS.items()),
        Reader("safetensors", (tensors(),), lambda path: shards.damage(path, "cache")),
        Reader("kept arrays", (kept(),), lambda path: read_arrays(path, {"size": 3})),
        Reader("checkpoint's manifest", (b'{"state.json": "00"}',), made.checkpoint(made.CHECKPOINT), True),
        Reader(
            "checkpoint's state", (b'{"step": 3, "processes": 1, "config": {}}',), made.checkpoint("state.json"), True
        ),
        Reader("best checkpoint", (b'{"step": 3, "checkpoint": "step-00000003"}',), made.checkpoint("best.json"), True),
        Reader(
            "texts alone: records",
            (lines({"text": "a", "title": "t"}, {"query": "b"}),),
            made.texts_alone("x.jsonl"),
            True,
        ),
        Reader("texts alone: lines", ("one\n\nzwei é\n".encode(),), made.texts_alone("queries.txt")),
        Reader("texts alone: parquet", made.parquet, made.texts_alone("x.parquet"), share=0.5),
        Reader("mixture", (made.PAIRS,), among({"a.jsonl": made.PAIRS}, "b.jsonl", made.mixture), True),
        Reader("token cache", made.tokens, made.token_cache),
        *inside("teacher cache", made.taught, made.taught_read),
        *inside("teacher cache, unverified", made.taught, partial(made.taught_read, verify=False)),
        *inside("vector cache", made.taught_as_vectors, made.taught_as_vectors_read),
        *inside("vector cache, unverified", made.taught_as_vectors, partial(made.taught_as_vectors_read, verify=False)),
        *inside("served answers", made.answered, made.answers_read, share=0.5),
        *inside("lens", made.fitted, made.lens_read),
        Reader("metrics", (made.METRICS,), among({}, "metrics.jsonl", made.metrics), True),
        Reader(
            "stage record", (json.dumps(made.STAGE).encode(),), among({"out": b"x"}, "stage.json", made.stage), True
        ),
        Reader("fingerprints", (b"{}",), among({"out": b"x"}, "fingerprints.json", made.stage), True),
        Reader(
            "owner record",
            lambda: json.dumps(made.owner._here()).encode(),
            among({}, made.owner.RECORD, made.owners),
            True,
        ),
        Reader("recipe", (made.RECIPE,), made.recipe, share=0.5),
        *(
            Reader(f"MS MARCO: {name}", (good,), among(made.MSMARCO, name, made.msmarco), share=0.5)
            for name, good in made.MSMARCO.items()
        ),
        *inside("index", made.indexed, made.index_read, names=("index.json", "ids.txt", "index.faiss")),
        *(Reader(*about) for about in hf.readers()),
        *(
            Reader(
                f"adapter: {name}",
                partial(lambda name: made.adapted()[name], name),
                among(made.adapted, name, read),
                *how,
            )
            for name, read, how in (
                ("adapter_config.json", made.adapter_read, (True,)),
                ("adapter_model.safetensors", made.adapter_merged, (False, 0.02)),
            )
        ),
        *(
            Reader(
                f"model: {name}",
                partial(lambda name: made.model()[name], name),
                among(made.model, name, made.model_read),
                name.endswith(".json") and not name.startswith("tokenizer"),
                0.5,
            )
            for name in MODEL
        ),
    )
}


def feed(reader: Reader, content: bytes, folder: Path) -> bool:
    """Give `content` to a reader, in a folder of its own; whether it was read. Any error but ours is a finding."""
    path = folder / "file"
    path.write_bytes(content)
    try:
        reader.read(path)
    except LeadError as error:
        told = str(error)
        assert "\n" not in told
        assert told.isprintable() or not told.isascii()
        return False
    return True
