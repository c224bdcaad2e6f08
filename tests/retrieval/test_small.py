"""Vectors in few bits: written as sentence-transformers would, indexed, rescored, and what that costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lead_ds.cli.main import app
from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.retrieval.encode import Encoding, Stored, encode_to
from lead_ds.retrieval.evaluate import Task, evaluate_path, open_encoder
from lead_ds.retrieval.index import Index, build_index
from lead_ds.retrieval.search import evaluate_index, model_facts
from lead_ds.retrieval.vectors import Vectors

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def stored(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vectors]:
    scorer, encoder = open_encoder(str(model), "cpu")
    folder, texts, facts = tmp_path_factory.mktemp("small"), Dataset.open(data).corpus, model_facts(model, scorer)
    dtypes: Any = ("float32", "int8", "binary", "ubinary")
    for _ in range(2):  # the second time nothing is left to do
        found = {
            dtype: encode_to(
                folder / dtype, scorer.embed, encoder, texts, facts, Encoding(), Stored(dtype, shard_rows=25)
            )
            for dtype in dtypes
        }
    return found


def whole(vectors: Vectors) -> np.ndarray:
    return np.concatenate(list(vectors.blocks()))


def test_the_bytes_are_sentence_transformers(stored: dict[str, Vectors]) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    floats = whole(stored["float32"])
    for dtype in ("int8", "binary", "ubinary"):
        vectors = stored[dtype]
        theirs: Any = quantize_embeddings(floats, precision=dtype)  # type: ignore[arg-type]
        other = whole(vectors) != theirs
        assert whole(vectors).dtype == theirs.dtype
        # A batch of another length rounds otherwise: a component at the edge of a step may fall on either side.
        assert other.mean() < (0.01 if dtype == "int8" else 1e-9)
        assert vectors.dimension == 16
        restored = vectors.floats(whole(vectors))
        np.testing.assert_array_equal(vectors.at(np.array([40, 3])), restored[[40, 3]])
        if dtype == "int8":
            step = (floats.max(0) - floats.min(0)) / 255
            assert (np.abs(restored - floats) <= step / 2 + 1e-5).all()
        else:
            np.testing.assert_array_equal(restored > 0, floats > 0)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_signs_are_found_and_rescored(stored: dict[str, Vectors], tmp_path: Path, factory: str) -> None:
    folder = build_index(stored["binary"], tmp_path / "i", factory, quiet=True, rescore=stored["int8"])
    floats = whole(stored["float32"])
    queries = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    settings: dict[str, Any] = {"IVF4,Flat": {"nprobe": 4}, "HNSW16": {"ef_search": 60}}.get(factory, {})
    scores, rows = Index.open(folder, rescored=0, **settings).search(queries, 60 if factory == "Flat" else 20)
    agree = ((queries > 0)[:, None] == (floats > 0)[rows]).sum(-1)
    np.testing.assert_array_equal(scores, 2 * agree - 16)
    best, found = Index.open(folder, rescored=6, **settings).search(queries, 10)  # all of them are candidates
    held = stored["int8"].floats(whole(stored["int8"]))
    np.testing.assert_allclose(best, -np.sort(-(queries @ held.T), axis=1)[:, :10], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(queries @ held.T, found, 1), best, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no nprobe" if factory == "Flat" else "60 passages"):
        Index.open(folder, **({"nprobe": 2} if factory == "Flat" else {})).search(queries, 61)


def test_int8_is_indexed_in_8_bits(stored: dict[str, Vectors], model: Path, data: Path, tmp_path: Path) -> None:
    folder = build_index(stored["int8"], tmp_path / "i", quiet=True)
    assert json.loads((folder / "index.json").read_text())["factory"] == "SQ8"
    task = Task(Dataset.open(data), "test", ["nDCG@10"])
    exact = evaluate_path(model, data, "test", ["nDCG@10"], quiet=True)["nDCG@10"]
    assert evaluate_index(str(model), folder, task, quiet=True).mean["nDCG@10"] == pytest.approx(exact, abs=0.05)
    with pytest.raises(InputError, match="no finer vectors"):
        Index.open(folder, rescored=2)


def test_the_commands_tell_quality_and_bytes(model: Path, data: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    given = ("evaluate", "--model", model, "--data", data, "--measures", "nDCG@20")
    run(*given, "--precision", "float32,int8,binary", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["precision"], row["rescored_by"], row["bytes"]) for row in rows] == [
        ("float32", "", 64),
        ("int8", "", 16),
        ("binary", "", 2),
        ("binary", "signs", 2),
        ("binary", "int8", 2),
    ]
    quality = [row["mean"]["nDCG@20"] for row in rows]
    assert quality[0] == pytest.approx(evaluate_path(model, data, "test", ["nDCG@20"], quiet=True)["nDCG@20"])
    assert quality[4] == pytest.approx(quality[1])  # all are candidates
    run("encode", "--model", model, "--data", data, "--out", tmp_path / "v", "--precision", "ubinary")
    run("encode", "--model", model, "--data", data, "--out", tmp_path / "fine", "--dtype", "int8")
    run("index", "--vectors", tmp_path / "v", "--out", tmp_path / "i", "--rescore", tmp_path / "fine")
    run(*given, "--index", tmp_path / "i", "--json", tmp_path / "indexed.json")
    indexed = json.loads((tmp_path / "indexed.json").read_text())["mean"]["nDCG@20"]
    assert indexed == pytest.approx(quality[4], abs=0.01)
    with pytest.raises(InputError, match="--dtype: int8 and --precision binary were both given"):
        run(
            "encode",
            "--model",
            model,
            "--data",
            data,
            "--out",
            tmp_path / "x",
            "--dtype",
            "int8",
            "--precision",
            "binary",
        )
