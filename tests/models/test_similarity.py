"""What a model's files say of similarity and truncate_dim holds wherever its vectors are compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.cli.main import main
from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.groups.open import open_groups
from lead_ds.data.reads import read
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder, load_student, load_teacher, load_text, settled_model
from lead_ds.models.student_dir import save_student
from lead_ds.retrieval.encoded import encode_both
from lead_ds.retrieval.rerank import Reranker
from lead_ds.retrieval.search import Searcher
from lead_ds.settings.data import DataConfig
from tests.models.tiny_models import tiny_model

QUERIES = ["who flies silently", "which thing has three hearts"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder whose vectors have other lengths than 1, compared by cosine."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    root = tmp_path_factory.mktemp("similarity")
    torch.manual_seed(3)
    dense = Dense(32, 24, activation_function=torch.nn.Identity())
    dense.linear.weight.data *= 5
    modules = [Transformer(tiny_model(root / "bert", "bert")), Pooling(32, "mean"), dense]
    SentenceTransformer(modules=modules).save_pretrained(str(root / "saved"), create_model_card=False)
    return root / "saved"


def variant(saved: Path, folder: Path, **changes: Any) -> str:
    """A copy with keys of config_sentence_transformers.json set."""
    shutil.copytree(saved, folder)
    file = folder / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


FORMS = [{"similarity_fn_name": None}, {"similarity_fn_name": "dot"}, {"truncate_dim": 7}]


@pytest.mark.parametrize("changes", FORMS)
def test_scores_are_those_of_sentence_transformers(
    saved: Path, rooms: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    from sentence_transformers import SentenceTransformer

    path = variant(saved, tmp_path / "model", **changes)
    reference = SentenceTransformer(path, device="cpu")
    dataset = Dataset.open(rooms / "data")
    texts = dataset.corpus.texts(range(60))
    theirs = reference.similarity(reference.encode_query(QUERIES), reference.encode_document(texts)).numpy()
    opened = scorer, encoder = load_encoder(path)
    assert scorer.features_width == changes.get("truncate_dim", 24)
    assert np.allclose(scorer.embed(encoder.queries(QUERIES)).detach(), reference.encode_query(QUERIES), atol=2e-5)

    found = Searcher.open(opened, dataset.folder, quiet=True).run(["a", "b"], QUERIES, 60)
    rows = {name: row for row, name in enumerate(dataset.corpus.ids)}
    for query, scores in zip(("a", "b"), theirs, strict=True):
        assert all(abs(scores[rows[name]] - score) < 2e-5 * max(1, abs(score)) for name, score in found[query].items())
    ids = list(dataset.queries.ids)[:2]
    run = encode_both(scorer.ranked, encoder, dataset, ids).search(5)
    assert all(len(hits) == 5 for hits in run.values())
    reranked = Reranker(scorer, encoder).scores(QUERIES[0], texts)
    assert np.allclose(reranked, theirs[0], rtol=2e-5, atol=2e-5)

    # In a run: the teacher's relevance, and a student's that is saved and read by the reference again.
    groups = open_groups(DataConfig(path=str(dataset.folder), negatives=2))
    batch_of = [groups.draw(row, 0, 0) for row in range(2)]
    config = settled_model(TeacherConfig(kind="dual_encoder", path=path))
    texts_of = [passage for group in batch_of for passage in group.passages]
    expected = reference.similarity(
        reference.encode_query([group.query for group in batch_of]), reference.encode_document(texts_of)
    )
    teacher = load_teacher(config, torch.float32)
    with torch.no_grad():
        said = teacher(read(load_text(config), batch_of)).final.relevance().logits[0]
    assert torch.allclose(said, expected, rtol=2e-5, atol=2e-5)
    student = load_student(settled_model(StudentConfig(path=path)), torch.float32).eval()
    save_student(student, load_text(settled_model(StudentConfig(path=path))), tmp_path / "student")
    again = SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert torch.allclose(
        again.similarity(again.encode_query(QUERIES), again.encode_query(QUERIES)),
        reference.similarity(reference.encode_query(QUERIES), reference.encode_query(QUERIES)),
        rtol=2e-5,
        atol=2e-5,
    )


def test_an_index_compares_as_its_model_does(
    saved: Path, rooms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    data = str(rooms / "data")
    for command in (
        ["encode", "--model", str(saved), "--data", data, "--out", str(tmp_path / "vectors")],
        ["index", "--vectors", str(tmp_path / "vectors"), "--out", str(tmp_path / "index")],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert not end.value.code, capfd.readouterr().err
    opened = load_encoder(str(saved))
    exact = Searcher.open(opened, data, quiet=True).run(["a"], QUERIES[:1], 10)
    indexed = Searcher.open(opened, data, index=tmp_path / "index").run(["a"], QUERIES[:1], 10)
    assert list(exact["a"]) == list(indexed["a"])
    assert np.allclose(list(exact["a"].values()), list(indexed["a"].values()), atol=1e-5)
    with pytest.raises(InputError, match="similarity cosine, here None"):
        Searcher.open(load_encoder(str(saved), ["normalize=false"]), data, index=tmp_path / "index")


def test_a_distance_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    for name in ("euclidean", "manhattan"):
        path = variant(saved, tmp_path / name, similarity_fn_name=name)
        with pytest.raises(InputError, match=rf"by {name} distance .*set normalize: true for cosine"):
            load_encoder(path)
        with pytest.raises(InputError, match=name):
            settled_model(StudentConfig(path=path))
        assert load_encoder(path, ["normalize=true"])[0].unit
