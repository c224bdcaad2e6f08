"""Encoding: order, sharing between processes, what a kill leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError, RunError
from lead_ds.io.files import model_checksum
from lead_ds.retrieval.encode import Encoding, Stored, encode_share, encode_to
from lead_ds.retrieval.evaluate import open_encoder
from lead_ds.retrieval.vectors import Vectors
from tests.helpers.launch import launch

MODEL = {"checksum": "m"}


def whole(vectors: Vectors) -> np.ndarray:
    return np.concatenate(list(vectors.blocks()))


def one_by_one(model: Path, data: Path) -> np.ndarray:
    """Every passage's vector, encoded alone."""
    scorer, encoder = open_encoder(str(model), "cpu")
    corpus = Dataset.open(data).corpus
    with torch.no_grad():
        return torch.cat([scorer.embed(encoder.passages([corpus.text(row)])) for row in range(len(corpus))]).numpy()


def test_every_text_gets_its_own_vector(model: Path, data: Path, tmp_path: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    corpus = Dataset.open(data).corpus
    expected = one_by_one(model, data)
    rows = [5, 59, 0, 17, 33]
    share = encode_share(scorer.embed, encoder, "corpus", corpus.texts, rows, Encoding(batch_size=2))
    np.testing.assert_allclose(share.numpy(), expected[rows], rtol=1e-4, atol=1e-5)
    vectors = encode_to(
        tmp_path / "v", scorer.embed, encoder, corpus, MODEL, Encoding(batch_size=7), Stored(shard_rows=25)
    )
    assert [block.shape for block in vectors.blocks()] == [(25, 16), (25, 16), (10, 16)]
    assert (len(vectors), vectors.dimension, list(vectors.ids())) == (60, 16, list(corpus.ids))
    np.testing.assert_allclose(whole(vectors), expected, rtol=1e-4, atol=1e-5)


def test_queries_and_float16(model: Path, data: Path, tmp_path: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    queries = Dataset.open(data).queries
    vectors = encode_to(tmp_path / "q", scorer.embed, encoder, queries, MODEL, stored=Stored("float16"))
    assert whole(vectors).dtype == np.float16
    with torch.no_grad():
        expected = scorer.embed(encoder.queries([queries.text(3)]))[0].numpy()
    np.testing.assert_allclose(whole(vectors)[3], expected, rtol=2e-3, atol=2e-3)


def test_two_processes_give_what_one_gives(model: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    results = launch(
        "tests.retrieval.jobs:encode",
        2,
        model=str(model),
        data=str(data),
        outs=[str(tmp_path / "two"), str(other)],
        batch_size=4,
        shard_rows=25,
    )
    # Shards of 25, 25 and 10 rows: two turns of 7 and 3 forwards, in which both processes take part.
    assert [result[0] for result in results] == [10, 10]
    np.testing.assert_allclose(whole(Vectors.open(tmp_path / "two")), one_by_one(model, data), rtol=1e-4, atol=1e-5)
    # An error of the first process ends all of them.
    assert all("holds vectors of another" in result[1] for result in results)


def test_a_killed_encode_is_finished_by_the_next(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "v"
    arguments = {"model": str(model), "data": str(data), "out": str(out), "batch_size": 5, "shard_rows": 20}
    with pytest.raises(AssertionError, match="failed on rank 0"):
        launch("tests.retrieval.jobs:encode_and_die", 1, **arguments, forwards=6)
    # 20 rows are 4 forwards: the first shard is there, the second was cut short and is not.
    assert sorted(path.name for path in out.glob("vectors-*")) == ["vectors-00000.npy"]
    with pytest.raises(InputError, match="2 of 3 shards are missing"):
        Vectors.open(out)
    first = (out / "vectors-00000.npy").stat()

    scorer, encoder = open_encoder(str(model), "cpu")
    rows = 0

    def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal rows
        rows += len(tokens["input_ids"])
        return scorer.embed(tokens)

    # Another batch size changes no vector, nor how the work was cut.
    vectors = encode_to(out, embed, encoder, Dataset.open(data).corpus, MODEL, Encoding(batch_size=3))
    assert rows == 40
    assert (out / "vectors-00000.npy").stat().st_mtime_ns == first.st_mtime_ns
    np.testing.assert_allclose(whole(vectors), one_by_one(model, data), rtol=1e-4, atol=1e-5)
    assert not list(out.glob(".*.tmp"))


def test_a_damaged_shard_is_made_again(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    corpus = Dataset.open(data).corpus
    vectors = encode_to(tmp_path / "v", scorer.embed, encoder, corpus, MODEL, stored=Stored(shard_rows=20))
    good, at = whole(vectors), vectors.path(1)
    content = bytearray(at.read_bytes())
    content[-7] ^= 1
    at.write_bytes(content)
    with pytest.raises(InputError, match=f"{at.name}: is not as it was written"):
        Vectors.open(tmp_path / "v")
    again = encode_to(tmp_path / "v", scorer.embed, encoder, corpus, MODEL)
    assert f"{at.name} is damaged (not as it was written): it is made again" in capsys.readouterr().err
    np.testing.assert_array_equal(whole(again), good)
    Vectors.open(tmp_path / "v")


def test_vectors_of_another_model_are_not_mixed(model: Path, data: Path, tmp_path: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    corpus = Dataset.open(data).corpus
    encode_to(tmp_path, scorer.embed, encoder, corpus, MODEL)
    with pytest.raises(InputError, match="holds vectors of another model"):
        encode_to(tmp_path, scorer.embed, encoder, corpus, {"checksum": "other"})
    encoder.passage_prompt = "passage: "
    with pytest.raises(InputError, match="another prompt"):
        encode_to(tmp_path, scorer.embed, encoder, corpus, MODEL)


def test_a_broken_model_is_told(model: Path, data: Path, tmp_path: Path) -> None:
    _, encoder = open_encoder(str(model), "cpu")
    with pytest.raises(RunError, match="vectors that float16 cannot hold"):
        encode_to(
            tmp_path / "v",
            lambda tokens: torch.full((len(tokens["input_ids"]), 4), 1e6),
            encoder,
            Dataset.open(data).corpus,
            MODEL,
            stored=Stored("float16"),
        )


def test_a_models_checksum_follows_its_weights(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_checksum(copy) == model_checksum(model)
    (copy / "README.md").write_text("hello")
    assert model_checksum(copy) == model_checksum(model)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert model_checksum(copy) != model_checksum(model)


def test_short_texts_share_a_forward_and_no_batch_is_beyond_the_budget(model: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    length, batch_size = encoder.passage_length, 4
    texts = [" ".join(["octopus hunts crabs"] * n) for n in (1, 90, 1, 2, 90, 1, 3, 90, 90, 90, 1, 2, 1, 1)] * 3
    shapes = []

    def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes.append(tuple(tokens["input_ids"].shape))
        return scorer.embed(tokens)

    share = encode_share(
        embed, encoder, "corpus", lambda rows: [texts[i] for i in rows], range(len(texts)), Encoding(batch_size=4)
    )
    with torch.no_grad():
        expected = torch.cat([scorer.embed(encoder.passages([text])) for text in texts])
    torch.testing.assert_close(share, expected, rtol=1e-4, atol=1e-5)
    assert sum(rows for rows, _ in shapes) == len(texts)
    assert all(rows * tokens <= batch_size * length for rows, tokens in shapes)
    assert shapes[0] == (batch_size, length)
    assert max(rows for rows, _ in shapes) > batch_size
    # Sorted by tokens: next to no padding.
    real = int(sum(encoder.passages([text])["attention_mask"].sum() for text in texts))
    assert sum(rows * tokens for rows, tokens in shapes) < 1.25 * real


def test_texts_beyond_full_length_are_fewer_in_a_forward(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    monkeypatch.setattr("lead_ds.retrieval.encode.FULL", 32)
    texts, shapes = ["octopus hunts crabs " * 90, "an octopus"] * 6, list[tuple[int, ...]]()

    def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes.append(tuple(tokens["input_ids"].shape))
        return scorer.embed(tokens)

    encode_share(embed, encoder, "corpus", lambda rows: [texts[i] for i in rows], range(12), Encoding(batch_size=8))
    assert shapes[0] == (8 * 32 // encoder.passage_length, encoder.passage_length)
    assert all(rows * tokens <= 8 * 32 for rows, tokens in shapes)


def test_mixed_precision_is_close_and_part_of_what_vectors_are(model: Path, data: Path, tmp_path: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    corpus = Dataset.open(data).corpus
    vectors = encode_to(tmp_path / "v", scorer.embed, encoder, corpus, MODEL, Encoding(precision="bf16"))
    close = torch.nn.functional.cosine_similarity(
        torch.from_numpy(whole(vectors)), torch.from_numpy(one_by_one(model, data))
    )
    assert 0.99 < close.min() < 1 - 1e-6
    with pytest.raises(InputError, match="holds vectors of another precision"):
        encode_to(tmp_path / "v", scorer.embed, encoder, corpus, MODEL)
    with pytest.raises(InputError, match="fp16 is for GPUs"):
        encode_to(tmp_path / "w", scorer.embed, encoder, corpus, MODEL, Encoding(precision="fp16"))
    assert not (tmp_path / "w").exists()
