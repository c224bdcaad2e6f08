"""Readers of what the program makes, and of models' directories: one file of a folder of good ones."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.data.collections.texts import Texts
from lead_ds.data.groups.open import open_groups
from lead_ds.data.taught import vectors as taught_vectors
from lead_ds.data.taught.relevance import RelevanceCache, identity, shard_arrays
from lead_ds.data.tokens.cache import Column
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.tokenizer import load_tokenizer
from lead_ds.engine.records.checkpoint import MANIFEST as CHECKPOINT
from lead_ds.engine.records.checkpoint import Checkpoints, checksum
from lead_ds.io import owner, shards
from lead_ds.io.adapters import adapter_of
from lead_ds.io.files import data_checksums
from lead_ds.io.fingerprints import Fingerprints
from lead_ds.models.lens import Lens, load_lens
from lead_ds.models.load import load_encoder
from lead_ds.models.merging import merge_adapter
from lead_ds.pipeline.recipe import Recipe
from lead_ds.pipeline.stage import Records, Stage
from lead_ds.prepare.build import prepare
from lead_ds.prepare.msmarco import open_msmarco
from lead_ds.report.record import read_run_record
from lead_ds.retrieval.index import Index
from lead_ds.settings.data import DataConfig
from lead_ds.teachers.served_answers import Answers

Good = Mapping[str, bytes]
Read = Callable[[Path], object]


def lines(*records: object) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


CORPUS = lines(*({"_id": f"p{i}", "title": "t" * (i % 2), "text": f"text {i} é"} for i in range(6)))
QUERIES = lines({"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"})


def among(good: Good | Callable[[], Good], name: str, read: Read) -> Read:
    """Read a folder of good files in which the one named is the input."""

    def run(path: Path) -> None:
        content, folder = path.read_bytes(), path.parent
        path.unlink()
        for other, data in {**(good() if callable(good) else good), name: content}.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_bytes(data)
        read(folder)

    return run


def files_of(make: Callable[[Path], object]) -> dict[str, bytes]:
    """What `make` writes into a folder, by name."""
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        return {str(p.relative_to(name)): p.read_bytes() for p in sorted(Path(name).rglob("*")) if p.is_file()}


def texts_alone(name: str) -> Read:
    def read(folder: Path) -> None:
        opened = open_groups(DataConfig(path=str(folder), train=name, format="texts", negatives=0))
        for row in range(min(len(opened), 8)):
            opened.draw(row, 0, 0)
            opened.where(row)

    return among({}, name, read)


@functools.cache
def parquet() -> bytes:
    import pyarrow as arrow
    from pyarrow import parquet as files

    out = io.BytesIO()
    files.write_table(arrow.table({"text": ["one", "two"], "role": ["query", None]}), out)
    return out.getvalue()


def mixture(folder: Path) -> None:
    named = (("a", 1), ("b", 2))
    sets = [{"path": str(folder), "train": f"{name}.jsonl", "weight": weight, "name": name} for name, weight in named]
    opened: Any = open_groups(DataConfig.model_validate({"sets": sets, "negatives": 1}))
    for slot in opened.drawn(range(8), 0, 2):
        opened.draw(slot.row, 0, slot.epoch)
        opened.listed(slot.row)
        opened.offered(slot.row)


PAIRS = lines({"query": "one", "pos": ["x"], "neg": ["y", "z"]}, {"query": "two", "pos": ["y", "w"], "neg": []})


@functools.cache
def encoder() -> TextEncoder:
    from tests.helpers.tiny import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(str(tiny_tokenizer(Path(folder), "wordpiece")))
        return TextEncoder("model", tokenizer, query_length=32, passage_length=128)


def column(folder: Path) -> Column:
    return Column(folder / "tokens", Texts.open(folder / "corpus.jsonl", "corpus"), encoder(), "", 8)


def token_cache(path: Path) -> None:
    content, corpus = path.read_bytes(), path.parent / "corpus.jsonl"
    path.rename(corpus).write_bytes(CORPUS)
    made = column(path.parent)
    made.folder.mkdir(parents=True)
    (made.folder / "000000.idx").write_bytes(content)
    if not made.missing():
        [made[row].sum() for row in range(len(made.texts))]


def tokens() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "corpus.jsonl").write_bytes(CORPUS)
        made = column(Path(name))
        made.build(0)
        return (made.folder / "000000.idx").read_bytes()


def taught(folder: Path) -> None:
    keys = [np.array([1, 3]), np.array([2, 5])]
    teacher = {"settings": {"kind": "cross_encoder"}}
    manifest: dict[str, Any] = {"facts": {"version": 1, "teacher": teacher, "data": {"groups": 2}}}
    manifest |= {"layers": 1, "shard_groups": 2}
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    arrays = shard_arrays(keys, np.ones((4, 2), np.float32))
    shards.save_arrays(folder / "relevance-00000.safetensors", arrays, identity(manifest))


def taught_read(folder: Path, verify: bool = True) -> None:
    cache = RelevanceCache.open(folder, verify=verify)
    cache.relevance([0, 1], [np.array([1]), np.array([5])])
    cache.held()


def taught_as_vectors(folder: Path) -> None:
    teacher = {"settings": {"kind": "dual_encoder"}}
    manifest: dict[str, Any] = {"facts": {"version": 1, "teacher": teacher, "data": {"groups": 1}, "vectors": [0]}}
    manifest |= {"layers": 1, "shard_texts": 2, "queries": 1, "passages": 2, "width": 3}
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    index = taught_vectors.Listing([(7, np.array([1, 2]))]).index()
    shards.save_arrays(folder / "index.safetensors", index, identity(manifest))
    for kind, count in (("queries", 1), ("passages", 2)):
        arrays = taught_vectors.vector_arrays(np.ones((count, 2, 3), np.float32))
        shards.save_arrays(folder / f"{kind}-00000.safetensors", arrays, identity(manifest))


def taught_as_vectors_read(folder: Path, verify: bool = True) -> None:
    cache = taught_vectors.VectorCache.open(folder, verify=verify)
    cache.said([0], [np.array([2])])
    cache.held()


class _Alone:
    rank, world, main = 0, 1, True

    def from_main(self, value: Any) -> Any:
        return value


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, _Alone(), 3)  # type: ignore[arg-type]


def checkpoint(part: str) -> Read:
    """part: "state.json", whose checksum is then right; the manifest; or best.json."""

    def read(path: Path) -> None:
        folder = path.parent / "checkpoints" / "step-00000003"
        folder.mkdir(parents=True)
        target = folder.parent / part if part == "best.json" else folder / part
        (folder / "state.json").write_text(json.dumps({"step": 3, "processes": 1, "config": {}}))
        if part == "state.json":
            target.write_bytes(path.read_bytes())
        (folder / CHECKPOINT).write_text(json.dumps({"state.json": checksum(folder / "state.json")}))
        target.write_bytes(path.read_bytes())
        found = checkpoints(folder.parent).newest(lambda text: None)
        if found is not None:
            checkpoints(folder.parent)._check(found[0])
        checkpoints(folder.parent).best()

    return read


FACTS = {"model": "m", "api": "openai"}


def answered(folder: Path) -> None:
    answers = Answers(folder, FACTS)
    answers.begin()
    answers.keep([("a",), ("b",)], np.ones((2, 3), np.float32))


def answers_read(folder: Path) -> None:
    answers = Answers(folder, FACTS)
    answers.begin()
    answers.read([("a",), ("c",)])
    len(answers)


def fitted(folder: Path) -> None:
    lens, facts = Lens.identity("scores", 2, 3, 1), {"a": 1}
    lens.save_weights(folder / "lens.safetensors")
    record = {"version": 1, "form": "scores", "facts": facts, "checksum": lens.checksum(facts), "layers": []}
    (folder / "lens.json").write_text(json.dumps(record))


def lens_read(folder: Path) -> None:
    load_lens(folder, "fit it")


METRICS = lines(
    {"step": 1, "loss": 0.5, "parts": {"layer": 0.5}, "lr": 0.1, "layers": {"teacher": [0, 2], "weights": [0.5, None]}},
    {"step": 1, "evaluation": {"nDCG@10": 0.5}},
    {"step": 2, "loss": 0.25, "parts": {"layer": 0.25}, "queries_per_second": 2.0},
)


def metrics(folder: Path) -> None:
    record = read_run_record(folder)
    for name in (*record.part_names, "loss", "lr"):
        record.series(name)
    [record.layer_map(name) for name in ("weights", "kl")]
    [sum(row["evaluation"].get(name, 0) for row in record.evaluations) for name in record.measures]


STAGE = {"stage": "x", "needs": {"a": "1"}, "finished": True, "outputs": {"out": "00"}, "seconds": 1.5}


def stage(folder: Path) -> None:
    records = Records(Fingerprints(folder / "fingerprints.json"))
    made = Stage("x", folder, "d", (("mine",),), ("out",), folder, ("a",))
    records.product(made)
    records.find(made, {"a": "1"})
    records.finish(made)


def owners(folder: Path) -> None:
    record = folder / owner.RECORD
    found = owner._read(record)
    if found is not None:
        owner._described(found)
        if found.get("host") == owner._here()["host"]:  # another host's is waited for
            owner._alive(record, found)


def indexed(folder: Path) -> None:
    import faiss

    index = faiss.IndexFlatIP(3)
    index.add(np.eye(3, dtype=np.float32))
    faiss.write_index(index, str(folder / "index.faiss"))
    (folder / "ids.txt").write_text("a\nb\nc\n")
    facts: dict[str, Any] = {
        "version": 1,
        "factory": "Flat",
        "dimension": 3,
        "model": {},
        "kind": "corpus",
        "prompt": "",
    }
    facts |= {"length": 8}
    facts |= {"data": "x", "count": 3, "checksums": data_checksums(folder, ("index.faiss", "ids.txt"))}
    (folder / "index.json").write_text(json.dumps(facts))


def index_read(folder: Path) -> None:
    opened = Index.open(folder)
    opened.search(np.ones((1, 3), np.float32), 2)
    opened.check_model({})


@functools.cache
def model() -> Good:
    """A tiny model as sentence-transformers saves one."""
    from tests.helpers.rooms import save_bert

    good = files_of(lambda folder: save_bert(folder, layers=1, width=8))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")))
    ]
    good["modules.json"] = json.dumps(modules).encode()
    good["1_Pooling/config.json"] = b'{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": true}'
    good["config_sentence_transformers.json"] = b'{"prompts": {"query": "q: "}, "similarity_fn_name": "cosine"}'
    good["sentence_bert_config.json"] = b'{"max_seq_length": 16, "do_lower_case": false}'
    good["lead_ds.json"] = b'{"kind": "dual_encoder", "query_length": 8, "passage_length": 16, "normalize": true}'
    return good


def model_read(folder: Path) -> None:
    load_encoder(folder)


@functools.cache
def adapted() -> Good:
    """An adapter, with its base beside it."""

    def make(folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        from tests.helpers.rooms import save_bert

        save_bert(folder / "base", layers=1, width=8)
        from transformers import AutoModel

        base = AutoModel.from_pretrained(folder / "base", add_pooling_layer=False)
        get_peft_model(base, LoraConfig(r=2, target_modules=["query"])).save_pretrained(folder)
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "base"}))
        (folder / "README.md").unlink(missing_ok=True)

    return files_of(make)


def adapter_read(folder: Path) -> None:
    adapter_of(str(folder))


def adapter_merged(folder: Path) -> None:
    merge_adapter(str(folder))


RECIPE = b"""teacher: {kind: cross_encoder, path: a}
student: {path: b}
data: {path: d, negatives: 2}
losses: {layer: {k: 2}}
train: {steps: 6}
output: o
pipeline:
  negatives: {source: bm25, number: 5}
  first: {train: {steps: 4}}
  mine: {number: 8, depth: 40}
  models: [first, distilled]
  evaluate: [{split: dev}, {split: test, measures: [nDCG@10], relevance_level: 1}]
"""


def recipe(path: Path) -> None:
    Recipe(path, [])


MSMARCO = {
    "collection.tsv": b"1\tone\n2\ttwo\n3\tthree\n",
    "queries.train.tsv": b"7\twhich one\n8\twhich two\n",
    "qrels.train.tsv": b"7\t0\t1\t1\n8\t0\t2\t1\n",
    "qidpidtriples.train.full.2.tsv": b"7\t1\t3\n8\t2\t1\n",
}


def msmarco(folder: Path) -> None:
    prepare(open_msmarco("msmarco-passage", folder), folder / "prepared", shown=False)
