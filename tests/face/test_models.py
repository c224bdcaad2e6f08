"""Loaded models, searchers and rerankers from Python agree with what the rooms below them compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lead_ds import Model, Reranker, Searcher, load
from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder
from tests.helpers.forked import lead_ds
from tests.helpers.rooms import TEACHERS

TEXTS = ["The octopus has three hearts.", "glacier", "A violin carries four strings tuned in fifths. " * 3]
QUERY = "which thing has three hearts"


@pytest.fixture(scope="module")
def model(rooms: Path) -> Model:
    return load(rooms / "student")


def test_vectors_are_those_of_the_encoder(rooms: Path, model: Model) -> None:
    scorer, encoder = load_encoder(str(rooms / "student"))
    with torch.no_grad():
        expected = {"passages": scorer.embed(encoder.passages(TEXTS)), "queries": scorer.embed(encoder.queries(TEXTS))}
    for side, vectors in expected.items():
        for batch_size in (1, 64):
            assert torch.allclose(model.encode(TEXTS, side, batch_size=batch_size), vectors, atol=1e-5)  # type: ignore[arg-type]
    assert model.encode([]).shape == (0, 16)
    with pytest.raises(InputError, match="'query' is neither"):
        model.encode(TEXTS, "query")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_last_of_the_layers_is_the_score(rooms: Path, kind: str) -> None:
    section = {name: value for name, value in TEACHERS[kind].items() if name not in ("kind", "path")}
    model = load(rooms / str(TEACHERS[kind]["path"]), kind=kind, **section)
    assert model.kind == kind
    scores, layers = model.score(QUERY, TEXTS), model.layers(QUERY, TEXTS)
    assert layers.shape == (model.num_layers + 1, 3)
    if kind == "dual_encoder":  # a teacher's final relevance follows `scale`, what is served does not
        vectors, query = model.encode(TEXTS), model.encode([QUERY], "queries")
        assert scores == pytest.approx((vectors @ query[0]).tolist(), abs=1e-4)
    else:
        assert layers[-1].tolist() == pytest.approx(scores, abs=1e-4)
    assert not torch.allclose(layers[0], layers[-1])
    if kind != "dual_encoder":
        with pytest.raises(InputError, match="gives no vector of a text"):
            model.encode(TEXTS)


def test_a_setting_that_is_none_is_refused(rooms: Path) -> None:
    with pytest.raises(InputError, match=r"passage_lenght.*passage_length"):
        load(rooms / "student", passage_lenght=3)
    with pytest.raises(InputError, match="without a trained scoring head"):
        load(rooms / "llama", kind="cross_encoder")


def test_search_in_memory_in_a_folder_and_in_an_index(rooms: Path, model: Model, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    corpus = Dataset.open(rooms / "data").corpus
    texts = {corpus.ids[row]: corpus.text(row) for row in range(len(corpus))}
    for command in (
        ["encode", "--model", str(rooms / "student"), "--data", str(rooms / "data"), "--out", str(tmp_path / "v")],
        ["index", "--vectors", str(tmp_path / "v"), "--out", str(tmp_path / "i")],
    ):
        lead_ds(*command).check_returncode()
    searchers = [
        Searcher(model, texts),
        Searcher(rooms / "student", rooms / "data"),
        Searcher(model, rooms / "data", index=tmp_path / "i"),
    ]
    for query in ("which thing grinds rock", "what guards the hive"):
        scores = (model.encode(list(texts.values())) @ model.encode([query], "queries")[0]).tolist()
        best = sorted(zip(texts, scores, strict=True), key=lambda pair: -pair[1])[:5]
        for searcher in searchers:
            hits = searcher.search(query, k=5)
            assert [hit.id for hit in hits] == [name for name, _ in best]
            assert [hit.score for hit in hits] == pytest.approx([score for _, score in best], abs=1e-4)
            assert [hit.text for hit in hits] == [texts[hit.id] for hit in hits]
    run = searchers[0].run(["which thing grinds rock"], k=3)
    assert list(run["0"]) == [hit.id for hit in searchers[0].search("which thing grinds rock", k=3)]
    assert len(searchers[0].search("a", k=1000)) == len(texts)

    bare = Searcher(model, index=tmp_path / "i").search("which thing grinds rock", k=3)
    assert [hit.text for hit in bare] == ["", "", ""]
    with pytest.raises(InputError, match="a passage has no text"):
        Reranker(model).rank("which thing grinds rock", bare)
    for arguments, what in (
        ({}, "needs a corpus or an index"),
        ({"corpus": ["a"], "index": tmp_path / "i"}, "do not go with an index"),
        ({"corpus": ["a"], "nprobe": 3}, "nprobe: is a setting of an index"),
        ({"corpus": []}, "holds no passages"),
    ):
        with pytest.raises(InputError, match=what):
            Searcher(model, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cross_encoder"):
        Searcher(load(rooms / "cross", max_length=64), ["a"])


def test_rerank_what_was_found(rooms: Path, model: Model) -> None:
    reranker = Reranker(load(rooms / "cross", max_length=64))
    hits = Searcher(model, TEXTS).search(QUERY)
    ranked = reranker.rank(QUERY, hits, k=2)
    scores = dict(zip(TEXTS, reranker.scores(QUERY, TEXTS), strict=True))
    expected = sorted(TEXTS, key=lambda text: -scores[text])[:2]
    assert [hit.text for hit in ranked] == expected
    assert [hit.id for hit in ranked] == [str(TEXTS.index(text)) for text in expected]
    for candidates in (TEXTS, dict(enumerate(TEXTS))):
        assert [hit.text for hit in reranker.rank(QUERY, candidates)][:2] == expected  # type: ignore[arg-type]
    assert reranker.rank(QUERY, []) == []
