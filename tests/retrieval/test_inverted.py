"""Sparse vectors on disk: encoded and indexed in parts, finished after a kill, searched as exactly as in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.io.shards import mapped
from lead_ds.models.load import load_scorer
from lead_ds.retrieval import inverted
from lead_ds.retrieval.encode import Stored, encode_to
from lead_ds.retrieval.evaluate import Task, evaluate_model
from lead_ds.retrieval.index import Index, build_index
from lead_ds.retrieval.search import Searcher, evaluate_index, model_facts
from lead_ds.retrieval.sparse import SparseVectors
from lead_ds.retrieval.vectors import Vectors
from tests.helpers.forked import lead_ds
from tests.models.tiny_models import tiny_model

ROWS = 25  # of a shard


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A masked language model, saved as a sparse encoder."""
    from sentence_transformers import SparseEncoder

    folder = tmp_path_factory.mktemp("sparse")
    SparseEncoder(tiny_model(folder, "bert", "masked", layers=1), device="cpu").save(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture(scope="module")
def vectors(masked: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    scorer, encoder = load_scorer(masked, "sparse")
    folder = tmp_path_factory.mktemp("vectors") / "v"
    made = model_facts(masked, scorer), {"stored": Stored("sparse", ROWS)}
    return encode_to(folder, scorer.eval().ranked, encoder, Dataset.open(data).corpus, made[0], **made[1])


@pytest.fixture(scope="module")
def index(vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_index(vectors, tmp_path_factory.mktemp("index") / "i", quiet=True)


def test_vectors_are_the_models_and_a_lost_shard_is_made_anew(masked: str, data: Path, vectors: Vectors) -> None:
    scorer, encoder = load_scorer(masked, "sparse")
    corpus = Dataset.open(data).corpus
    with torch.no_grad():
        wanted = scorer.eval().embed(encoder.passages(corpus.texts(range(len(corpus)))))
    stored = sparse.vstack([sparse.load_npz(vectors.path(shard)) for shard in range(vectors.shards)])
    np.testing.assert_allclose(stored.toarray(), wanted.numpy(), atol=1e-5)
    assert vectors.shards == -(-len(corpus) // ROWS) > 1
    before = {shard: vectors.path(shard).stat().st_mtime_ns for shard in range(vectors.shards)}
    vectors.path(1).unlink()
    with pytest.raises(InputError, match="1 of 3 shards are missing"):
        Vectors.open(vectors.folder)
    facts = model_facts(masked, scorer)
    encode_to(vectors.folder, scorer.ranked, encoder, corpus, facts, stored=Stored("sparse", ROWS))
    changed = [shard for shard in before if vectors.path(shard).stat().st_mtime_ns != before[shard]]
    assert changed == [1]
    np.testing.assert_allclose(vectors.sparse(1).rows.toarray(), wanted[ROWS : 2 * ROWS].numpy(), atol=1e-5)


def test_an_index_finds_what_memory_does(masked: str, data: Path, index: Path) -> None:
    opened, dataset = load_scorer(masked, "sparse"), Dataset.open(data)
    opened[0].eval()
    queries = dataset.queries.texts(range(len(dataset.queries)))
    ids = [str(row) for row in range(len(queries))]
    exact = Searcher.over_corpus(*opened, dataset.corpus, quiet=True).run(ids, queries, 20)
    found = Searcher.open(opened, data, index=index).run(ids, queries, 20)
    assert found.keys() == exact.keys()
    for query, wanted in exact.items():
        assert list(found[query].values()) == pytest.approx(list(wanted.values()), rel=1e-4)
    task = Task(dataset, "test")
    whole = evaluate_model(*opened, task, quiet=True).mean
    assert evaluate_index(opened, index, task, quiet=True).mean == pytest.approx(whole, abs=1e-3)
    first = next(iter(Index.open(index).blocks()))[1]  # type: ignore[attr-defined]
    assert isinstance(first.data.base.base, torch.Tensor)  # that maps the file: nothing was copied


def test_a_build_is_finished_after_a_kill(
    vectors: Vectors, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, wrote = inverted.save_arrays, 0

    def killed(*of: object) -> None:
        nonlocal wrote
        wrote += 1
        if wrote == 2:
            raise KeyboardInterrupt
        save(*of)  # type: ignore[arg-type]

    monkeypatch.setattr(inverted, "save_arrays", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(vectors, tmp_path / "i", quiet=True)
    with pytest.raises(InputError, match="make it with lead-ds index"):
        Index.open(tmp_path / "i")
    kept = (tmp_path / "i" / "postings-00000.safetensors").stat().st_mtime_ns
    build_index(vectors, tmp_path / "i", quiet=True)
    assert (tmp_path / "i" / "postings-00000.safetensors").stat().st_mtime_ns == kept
    for path in index.glob("postings-*"):
        ours, theirs = mapped(tmp_path / "i" / path.name)[0], mapped(path)[0]
        assert all((ours[name] == theirs[name]).all() for name in ("starts", "passages", "weights"))
    ours, theirs = (json.loads((folder / "index.json").read_text()) for folder in (tmp_path / "i", index))
    assert (
        ours.pop("checksums").keys() == theirs.pop("checksums").keys()
    )  # of bytes: safetensors' metadata has any order
    assert ours == theirs


def test_what_an_inverted_index_has_not_is_refused(vectors: Vectors, model: Path, index: Path, tmp_path: Path) -> None:
    for settings in ({"factory": "IVF4,Flat"}, {"gpus": 1}, {"rescore": vectors}):
        with pytest.raises(InputError, match=f"{next(iter(settings))}: is of dense vectors"):
            build_index(vectors, tmp_path / "i", quiet=True, **settings)  # type: ignore[arg-type]
    for name in ("nprobe", "ef_search", "rescored", "gpus"):
        with pytest.raises(InputError, match=f"an inverted index has no {name}"):
            Index.open(index, **{name: 2})  # type: ignore[arg-type]
    assert build_index(vectors, index, quiet=True) == index
    with pytest.raises(InputError, match="was made by another model"):
        Searcher.open(str(model), index=index)
    with pytest.raises(InputError, match="1000 results requested of"):
        Index.open(index).search(SparseVectors(sparse.csr_matrix((1, vectors.dimension))), 1000)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in index.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    last = sorted(copy.glob("postings-*"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(InputError, match=f"{last.name}: cannot be read: cut short"):
        Index.open(copy)
    last.write_bytes((index / last.name).read_bytes())
    (copy / "ids.txt").write_text((index / "ids.txt").read_text().replace("p1\n", "p01\n"))
    with pytest.raises(InputError, match=r"ids\.txt: is not as it was written"):
        Index.open(copy)
    meta = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**meta, "prompt": "other"}))
    with pytest.raises(InputError, match="does not belong to this index"):
        Index.open(copy)


def test_from_the_command_line(masked: str, data: Path, tmp_path: Path) -> None:
    vectors, index = str(tmp_path / "v"), str(tmp_path / "i")
    asked = ["--model", masked, "--data", str(data)]
    refused = lead_ds("encode", *asked, "--out", vectors, "--dtype", "int8")
    assert refused.returncode == 2
    assert "--dtype: int8 is of dense vectors" in refused.stderr
    for command in (
        ["encode", *asked, "--out", vectors],
        ["index", "--vectors", vectors, "--out", index, "--data", str(data)],
        ["search", *asked, "--index", index, "a river"],
        ["evaluate", *asked, "--index", index, "--split", "test"],
    ):
        done = lead_ds(*command)
        assert done.returncode == 0, done.stderr
    assert "nDCG@10" in done.stdout
