"""Exports: the same vectors in onnxruntime as in torch, in a folder that is whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.config import StudentConfig
from lead_ds.errors import InputError, RunError
from lead_ds.models import export, onnx_file
from lead_ds.models.load import load_encoder, load_student, load_text
from lead_ds.models.student_dir import save_student

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

TEXTS = [
    "the hive entrance",
    "a",
    "an octopus has three hearts and squeezes through narrow gaps in coral",
    "Grüße 北京",
]

# Every pooling, with and without Dense and unit length, with token types and without, padded on the right.
KINDS: dict[str, dict[str, Any]] = {
    "mean": {"path": "student", "pooling": "mean", "normalize": True},
    "cls with Dense": {"path": "bert", "pooling": "cls", "projection": 12},
    "decoder": {"path": "llama", "pooling": "last"},
}


def saved(rooms: Path, folder: Path, kind: str) -> Path:
    config = StudentConfig(**{**KINDS[kind], "path": str(rooms / KINDS[kind]["path"])})
    encoder = load_text(config)
    return save_student(
        load_student(config, torch.float32), encoder, folder, card="---\nlicense: mit\n---\n\nA card.\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_gives_the_same_vectors(rooms: Path, tmp_path: Path, kind: str) -> None:
    student = saved(rooms, tmp_path / "student", kind)
    done = export.export_onnx(str(student), tmp_path / "out")
    assert done.difference < export.TOLERANCE
    assert done.least_cosine > 0.99999
    scorer, encoder = load_encoder(str(student))
    session = onnxruntime.InferenceSession(str(done.path))
    for size in (1, 4):
        tokens = encoder.passages(TEXTS[:size])
        inputs = {x.name: tokens[x.name].numpy() for x in session.get_inputs()}
        states, vectors = session.run(["last_hidden_state", "sentence_embedding"], inputs)
        with torch.no_grad():
            expected = scorer.embed(tokens).numpy()
        np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)
        assert states.shape == (*tokens["input_ids"].shape, scorer.width)
    # Everything that reads text and pools stands beside it, the torch weights do not.
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "modules.json", "config.json", "lead_ds.json", "onnx", "1_Pooling"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\nA card.\n")
    assert "sentence_embedding" in card
    assert (tmp_path / "out" / "lead_ds.json").read_bytes() == (student / "lead_ds.json").read_bytes()


def test_int8_holds_its_weights_in_int8_and_is_close(rooms: Path, tmp_path: Path) -> None:
    import onnx

    student = saved(rooms, tmp_path / "student", "mean")
    done = export.export_onnx(str(student), tmp_path / "int8", int8=True)
    weights = [x for x in onnx.load(str(done.path)).graph.initializer if len(x.dims) == 2]
    small = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert all(x.data_type in small for x in weights if min(x.dims) >= 16), [x.name for x in weights]
    # (A model this small is all names and scales: the whole file says nothing.)
    assert export.INT8_COSINE < done.least_cosine <= done.mean_cosine < 1 - 1e-7
    assert [path.name for path in done.path.parent.iterdir()] == ["model.onnx"]
    vectors = onnx_file.OnnxEncoder(done.path).embed(load_encoder(str(student))[1].passages(TEXTS))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_product_of_int8_saturates_16_bits(rooms: Path, tmp_path: Path, kind: str) -> None:
    # AVX2 and AVX-512 without VNNI add two products of u8 and s8 in 16 bits (vpmaddubsw).
    import onnx

    done = export.export_onnx(str(saved(rooms, tmp_path / "student", kind)), tmp_path / "int8", int8=True)
    graph = onnx.load(str(done.path)).graph
    held = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    products = [node for node in graph.node if node.op_type in {"MatMulInteger", "QLinearMatMul", "ConvInteger"}]
    assert len(products) >= 6
    for node in products:
        weights = held[node.input[1]]
        assert weights.dtype == np.int8
        assert 2 * 255 * int(np.abs(weights).max()) <= np.iinfo(np.int16).max
        assert np.abs(weights).max() == onnx_file.MOST_WEIGHT  # the whole of what is safe is used
    used = {name for node in graph.node for name in node.input if node.op_type in {"MatMul", "Gemm"}}
    assert not [name for name in used & held.keys() if held[name].ndim == 2 and min(held[name].shape) >= 16]


def test_a_file_that_gives_other_vectors_here_is_refused(rooms: Path, tmp_path: Path) -> None:
    import onnx

    done = export.export_onnx(str(saved(rooms, tmp_path / "student", "mean")), tmp_path / "int8", int8=True)
    graph = onnx.load(str(done.path))
    weights = max(
        (x for x in graph.graph.initializer if x.data_type == onnx.TensorProto.INT8), key=lambda x: len(x.raw_data)
    )
    halved = onnx.numpy_helper.to_array(weights).copy()
    halved[len(halved) // 2 :] = 0
    weights.raw_data = halved.tobytes()
    onnx.save_model(graph, str(tmp_path / "other.onnx"))
    with pytest.raises(InputError, match=r"other\.onnx: gives other vectors on this CPU than on its writer's"):
        onnx_file.OnnxEncoder(tmp_path / "other.onnx")
    del graph.metadata_props[:]
    onnx.save_model(graph, str(tmp_path / "bare.onnx"))
    with pytest.raises(InputError, match="holds no texts to check its vectors by"):
        onnx_file.OnnxEncoder(tmp_path / "bare.onnx")


def test_a_plain_directory_loads_in_sentence_transformers(rooms: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    export.export_sentence_transformers(str(rooms / "student"), tmp_path / "out")
    scorer, encoder = load_encoder(str(rooms / "student"))
    with torch.no_grad():
        expected = scorer.embed(encoder.passages(TEXTS)).numpy()
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, expected, rtol=1e-4, atol=1e-5)


def test_weights_in_a_file_of_their_own(rooms: Path, tmp_path: Path) -> None:
    # What torch writes beyond 2 GB: the graph, and a file per tensor.
    import onnx

    done = export.export_onnx(str(rooms / "student"), tmp_path / "out")
    before = onnx_file.OnnxEncoder(done.path)
    split = tmp_path / "split"
    split.mkdir()
    graph = onnx.load(str(done.path))
    onnx.save_model(graph, str(split / "model.onnx"), save_as_external_data=True, all_tensors_to_one_file=False)
    assert len(list(split.iterdir())) > 10
    export._join(split / "model.onnx")
    assert {path.name for path in split.iterdir()} == {"model.onnx", "model.onnx_data"}
    tokens = load_encoder(str(rooms / "student"))[1].passages(TEXTS)
    assert torch.equal(before.embed(tokens), onnx_file.OnnxEncoder(split / "model.onnx").embed(tokens))


def test_nothing_is_left_of_an_export_that_differs(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = export._trace

    def harmed(scorer: Any, encoder: Any, file: Path) -> None:
        trace(scorer, encoder, file)
        with torch.no_grad():
            next(scorer.model.encoder.layer[0].parameters()).mul_(1.01)  # torch's side is what moves

    monkeypatch.setattr(export, "_trace", harmed)
    with pytest.raises(RunError, match="vectors differ from torch's by"):
        export.export_onnx(str(rooms / "student"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_int8_that_ruins_the_vectors_is_refused(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "INT8_COSINE", 0.9999999)
    with pytest.raises(RunError, match="mean cosine of"):
        export.export_onnx(str(rooms / "student"), tmp_path / "out", int8=True)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told(rooms: Path, tmp_path: Path) -> None:
    shutil.copytree(rooms / "cross", tmp_path / "cross")
    (tmp_path / "cross" / "lead_ds.json").write_text(json.dumps({"kind": "cross_encoder"}))
    with pytest.raises(InputError, match="holds a cross_encoder"):
        export.export_onnx(str(tmp_path / "cross"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    with pytest.raises(InputError, match="is there already"):
        export.export_onnx(str(rooms / "student"), tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_texts_to_compare_fill_the_length() -> None:
    lengths = [len(text.split()) for text in export.check_texts(128)]
    assert lengths[:3] == [0, 1, 2]
    assert max(lengths) > 128
    assert len(set(lengths)) == len(lengths)
