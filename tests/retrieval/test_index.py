"""FAISS indexes and searching in them."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError, RunError
from lead_ds.retrieval.encode import Stored, encode_to
from lead_ds.retrieval.evaluate import evaluate_path, evaluate_run, open_encoder
from lead_ds.retrieval.index import Index, build_index
from lead_ds.retrieval.search import Searcher, model_facts
from lead_ds.retrieval.vectors import Vectors
from tests.helpers.tiny import tiny_tokenizer

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def vectors(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    scorer, encoder = open_encoder(str(model), "cpu")
    folder = tmp_path_factory.mktemp("vectors") / "v"
    facts = model_facts(model, scorer)
    return encode_to(folder, scorer.embed, encoder, Dataset.open(data).corpus, facts, stored=Stored(shard_rows=25))


@pytest.fixture(scope="module")
def flat(vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_index(vectors, tmp_path_factory.mktemp("index") / "flat", quiet=True)


def test_flat_is_exact(vectors: Vectors, flat: Path) -> None:
    index = Index.open(flat)
    whole = np.concatenate([block.astype(np.float32) for block in vectors.blocks()])
    queries = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    scores, rows = index.search(queries, 7)
    expected = np.argsort(-(queries @ whole.T), axis=1)[:, :7]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ whole.T, expected, 1), rtol=1e-4, atol=1e-5)
    assert index.search(queries, 60)[1].shape == (5, 60)
    with pytest.raises(InputError, match="k: 61 results requested of 60 passages"):
        index.search(queries, 61)
    with pytest.raises(InputError, match="use at least 1"):
        index.search(queries, 0)


@pytest.mark.parametrize(
    ("factory", "settings"),
    [("IVF4,Flat", {"nprobe": 4}), ("HNSW16", {"ef_search": 64}), ("IVF4,SQfp16", {"nprobe": 4}), ("PQ8x4", {})],
)
def test_kinds_of_index(vectors: Vectors, flat: Path, tmp_path: Path, factory: str, settings: dict[str, int]) -> None:
    folder = build_index(vectors, tmp_path / "index", factory, quiet=True)
    queries = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32)
    best, exact = Index.open(flat).search(queries, 10)
    _, rows = Index.open(folder, **settings).search(queries, 10)
    if factory.startswith("PQ"):
        shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), rows.tolist(), strict=True)])
        assert shared >= 0.4
    else:
        # By scores: which of two nearly equal passages comes first, a half float's rounding decides.
        whole = np.concatenate([block.astype(np.float32) for block in vectors.blocks()])
        found = -np.sort(-np.take_along_axis(queries @ whole.T, rows, 1), axis=1)
        largest = np.linalg.norm(queries, axis=1).max() * np.linalg.norm(whole, axis=1).max()
        np.testing.assert_allclose(found, best, rtol=0, atol=2**-10 * largest)
        assert all(len(set(row)) == 10 for row in rows.tolist())
    meta = json.loads((folder / "index.json").read_text())
    assert (meta["factory"], meta["dimension"], meta["count"]) == (factory, 16, 60)
    assert meta["model"]["pooling"] == "cls"


@pytest.mark.parametrize("factory", ["nonsense", "IVFx,Flat", "", "PQ7", "IVF1000,Flat", "IDMap,Flat"])
def test_factory_strings_that_faiss_refuses(vectors: Vectors, tmp_path: Path, factory: str) -> None:
    with pytest.raises(InputError, match="factory: "):
        build_index(vectors, tmp_path / "index", factory, quiet=True)
    assert not (tmp_path / "index").exists()


def test_only_what_is_trained_is_built_on_gpus(vectors: Vectors, flat: Path, tmp_path: Path) -> None:
    queries = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    folder = build_index(vectors, tmp_path / "flat", "Flat", gpus=1000, quiet=True)
    np.testing.assert_array_equal(Index.open(folder).search(queries, 7)[1], Index.open(flat).search(queries, 7)[1])
    with pytest.raises(InputError, match="1000 requested, FAISS sees"):
        build_index(vectors, tmp_path / "cells", "IVF4,Flat", gpus=1000, quiet=True)


def test_an_index_is_mapped_and_not_read(tmp_path: Path) -> None:
    import faiss

    def held() -> int:
        [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    if not hasattr(faiss, "IO_FLAG_MMAP_IFC") or not Path("/proc/self/status").exists():
        pytest.skip("needs Linux and a FAISS that maps every kind of index")
    count, width = 40_000, 256
    index = faiss.IndexFlatIP(width)
    index.add(np.zeros((count, width), np.float32))
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    del index
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(count)))
    meta = {"factory": "Flat", "dimension": width, "count": count, "kind": "corpus", "prompt": "", "model": {}}
    (tmp_path / "index.json").write_text(json.dumps(meta))
    before = held()
    opened = Index.open(tmp_path)
    assert opened.search(np.ones((1, width), np.float32), 3)[1].shape == (1, 3)
    assert held() - before < count * width * 4 / 2


def test_the_same_index_again_is_left_as_it_is(vectors: Vectors, tmp_path: Path) -> None:
    out = build_index(vectors, tmp_path / "i", rescore=vectors, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert build_index(vectors, out, rescore=vectors, quiet=True) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(InputError, match="already holds another index"):
        build_index(vectors, out, quiet=True)
    (out / "index.faiss").write_bytes(b"")
    with pytest.raises(InputError, match="is not as it was written"):
        build_index(vectors, out, rescore=vectors, quiet=True)


def test_folders_that_are_no_index(flat: Path, vectors: Vectors, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make it with lead-ds index"):
        Index.open(tmp_path)
    with pytest.raises(InputError, match="already holds another index"):
        build_index(vectors, flat, "HNSW8")
    with pytest.raises(InputError, match="has no nprobe"):
        Index.open(flat, nprobe=4)
    with pytest.raises(InputError, match="1000 requested, FAISS sees"):
        Index.open(flat, gpus=1000)
    for file in flat.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ids.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"ids\.txt: is not as it was written"):
        Index.open(tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not as it was written"):
        Index.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("manifest.json", b"{}", "does not give the kind"),
        ("manifest.json", None, "make it with lead-ds encode"),
        ("vectors-00001.npy", b"nonsense", "vectors-00001.npy: is damaged"),
        ("vectors-00001.npy", -100, "vectors-00001.npy: is damaged"),
        ("vectors-00002.npy", "vectors-00001.npy", "another number of vectors"),
        ("vectors-00001.npy", None, "1 of 3 shards are missing"),
        ("vectors-00001.npy", "vectors-00000.npy", "vectors-00001.npy: is not as it was written"),
        ("ids.txt", b"a\nb\n", "ids.txt: is not as it was written"),
        ("ids.txt", None, "no such file"),
    ],
)
def test_vectors_that_are_damaged(vectors: Vectors, tmp_path: Path, file: str, content: object, message: str) -> None:
    harmed = tmp_path / "v"
    shutil.copytree(vectors.folder, harmed)
    place = harmed / file
    if content is None:
        place.unlink()
    elif isinstance(content, int):
        place.write_bytes(place.read_bytes()[:content])
    else:
        place.write_bytes(content if isinstance(content, bytes) else (harmed / str(content)).read_bytes())
    with pytest.raises(InputError, match=message):
        build_index(Vectors.open(harmed), tmp_path / "index", quiet=True)
    assert not (tmp_path / "index").exists()


def test_search_with_and_without_an_index(model: Path, data: Path, flat: Path) -> None:
    exact = Searcher.open(model, data, device="cpu", quiet=True)
    indexed = Searcher.open(model, data, index=flat, device="cpu")
    hits, others = (
        exact.search("which thing guards the hive entrance", k=5),
        indexed.search("which thing guards the hive entrance", k=5),
    )
    assert [hit.id for hit in hits] == [hit.id for hit in others]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    corpus = Dataset.open(data).corpus
    assert [hit.text for hit in hits] == [corpus.text(corpus.row(hit.id)) for hit in hits]
    assert Searcher.open(model, index=flat, device="cpu").search("x", k=2)[0].text == ""
    for searcher in (exact, indexed):
        assert len(searcher.search("x", k=60)) == len(searcher.run(["q"], ["x"])["q"]) == 60
        with pytest.raises(InputError, match="k: 1000 results requested of 60 passages"):
            searcher.search("x", k=1000)


def test_a_run_through_an_index_evaluates_like_the_model(model: Path, data: Path, flat: Path) -> None:
    dataset = Dataset.open(data)
    qrels = dataset.qrels("test")
    queries = dataset.queries.texts(dataset.queries.rows(list(qrels)))
    run = Searcher.open(model, index=flat, device="cpu").run(list(qrels), queries)
    measures = ["nDCG@10", "R@100"]
    expected = evaluate_path(model, data, "test", measures, quiet=True)
    assert evaluate_run(run, qrels, measures).mean == pytest.approx(expected)


def test_another_model_is_refused(model: Path, data: Path, flat: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=400, **shape), add_pooling_layer=False).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    with pytest.raises(InputError, match="was made by another model: checksum"):
        Searcher.open(tmp_path, index=flat)
    with pytest.raises(InputError, match="needs an index or a dataset"):
        Searcher.open(model)


def test_a_damaged_index_is_refused_before_faiss_reads_it(vectors: Vectors, tmp_path: Path) -> None:
    file = build_index(vectors, tmp_path / "index", "HNSW4", quiet=True) / "index.faiss"
    Index.open(tmp_path / "index")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"index\.faiss: is not as it was written \(build it again\)"):
        Index.open(tmp_path / "index")


def test_an_index_without_checksums_is_read_and_told(
    vectors: Vectors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = build_index(vectors, tmp_path / "index", quiet=True) / "index.json"
    Index.open(tmp_path / "index")
    assert not capsys.readouterr().err
    record.write_text(
        json.dumps({name: x for name, x in json.loads(record.read_text()).items() if name != "checksums"})
    )
    Index.open(tmp_path / "index")
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'index'}: has no checksums, so that its files are read")


def test_an_index_whose_last_block_does_not_fit_is_not_taken_for_one(
    vectors: Vectors, flat: Path, tmp_path: Path
) -> None:
    # FAISS by itself writes half of it, and says nothing.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((flat / "index.faiss").stat().st_size - 1, hard))
    try:
        with pytest.raises(RunError, match=r"index\.faiss: cannot be written: .*File too large"):
            build_index(vectors, tmp_path / "i", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "i" / "index.faiss").exists()
