"""A saved student is what others' tools load, gives the same numbers there, and comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lead_ds.config import StudentConfig
from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError, RunError
from lead_ds.models.kinds.colbert import ColBERT
from lead_ds.models.kinds.cross_encoder import CrossEncoder
from lead_ds.models.kinds.dual_encoder import DualEncoder
from lead_ds.models.load import load_encoder, load_student, load_text
from lead_ds.models.scorer import Scorer
from lead_ds.models.student_dir import save_student
from tests.models.tiny_models import tiny_model

QUERIES = ["which thing has three hearts", "which thing flies silently on soft feathers", "bread"]
PASSAGES = ["the octopus hunts crabs at night", "bread rises because yeast makes gas " * 3, "owl"]


def _saved(folder: Path, family: str, head: str = "base", **settings: Any) -> tuple[Scorer, TextEncoder, Path]:
    torch.manual_seed(7)
    config = StudentConfig(path=tiny_model(folder / "origin", family, head), **settings)
    scorer, encoder = load_student(config, torch.float32).eval(), load_text(config)
    return scorer, encoder, save_student(scorer, encoder, folder / "saved")


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert", "qwen3"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize(("projection", "normalize"), [(None, False), (None, True), (24, False), (24, True)])
def test_sentence_transformers_gives_the_same_vectors(
    tmp_path: Path, family: str, pooling: str, projection: int | None, normalize: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    scorer, encoder, folder = _saved(
        tmp_path,
        family,
        pooling=pooling,
        projection=projection,
        normalize=normalize,
        query_prompt="query: ",
        passage_prompt="the passage: ",
        query_length=48,
        passage_length=64,
    )
    assert isinstance(scorer, DualEncoder)
    model = SentenceTransformer(str(folder), device="cpu")
    assert model.max_seq_length == 64
    assert model.similarity_fn_name == ("cosine" if normalize else "dot")
    with torch.no_grad():
        for texts, prompt, tokens in (
            (QUERIES, "query", encoder.queries(QUERIES)),
            (PASSAGES, "document", encoder.passages(PASSAGES)),
        ):
            mine = scorer.embed(tokens)
            assert mine.shape == (3, scorer.vector_width)
            theirs = model.encode(texts, prompt_name=prompt, convert_to_tensor=True)
            torch.testing.assert_close(theirs.clone(), mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"pooling": "mean"}, {"projection": 24, "normalize": True, "layers": [0, 2]}])
def test_round_trip_is_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    lengths = {"query_length": 9, "passage_length": 30}
    scorer, encoder, folder = _saved(tmp_path, "bert", **lengths, scale="cosine", query_prompt="which ", **settings)
    again, reader = load_encoder(str(folder))
    # Queries are served as long as passages: sentence-transformers knows one length.
    assert (reader.query_length, reader.passage_length, again.config.scale) == (30, 30, "cosine")
    assert reader.query_prompt == "which "
    assert not again.training
    with torch.no_grad():
        for texts in (QUERIES, PASSAGES):
            assert torch.equal(again.embed(reader.passages(texts)), scorer(tokens=encoder.passages(texts)))
            assert torch.equal(again.embed(reader.queries(texts)), scorer(tokens=encoder.serving().queries(texts)))
    assert load_encoder(str(folder), ["query_length=5", "passage_length=5"])[1].query_length == 5


def test_a_saved_directory_is_complete_and_replaced_whole(tmp_path: Path) -> None:
    scorer, encoder, folder = _saved(tmp_path, "bert", projection=8, normalize=True)
    (folder / "stale").write_text("from an earlier student")
    save_student(scorer, encoder, folder, card="# mine\n")
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert "stale" not in names
    assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "lead_ds.json"} <= names
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert (folder / "README.md").read_text() == "# mine\n"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "saved"], "nothing else is left behind"


def test_what_fails_leaves_the_old_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, encoder, folder = _saved(tmp_path, "bert")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoder.tokenizer.__class__, "save_pretrained", full)
    with pytest.raises(RunError, match="No space"):
        save_student(scorer, encoder, folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin", "saved"]


def test_a_gathered_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    scorer, encoder, _ = _saved(tmp_path, "bert", projection=8)
    state = {name: torch.full_like(x, 0.5) for name, x in scorer.state_dict().items()}
    folder = save_student(scorer, encoder, tmp_path / "other", state_dict=state)
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        assert all((x == 0.5).all() for x in load_file(folder / file).values())


def test_a_cross_encoder_is_read_by_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder as Theirs

    scorer, encoder, folder = _saved(tmp_path, "bert", "classifier", kind="cross_encoder", max_length=60)
    assert isinstance(scorer, CrossEncoder)
    pairs = encoder.pairs(QUERIES, PASSAGES)
    with torch.no_grad():
        mine = scorer(tokens=pairs)
        again = load_student(StudentConfig(kind="cross_encoder", path=str(folder)), torch.float32).eval()
        assert torch.equal(again(tokens=pairs), mine)
    theirs = Theirs(str(folder), device="cpu").predict(
        list(zip(QUERIES, PASSAGES, strict=True)), convert_to_tensor=True
    )
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="holds a cross_encoder"):
        load_encoder(str(folder))


@pytest.mark.parametrize(("token_dim", "normalize"), [(16, True), (16, False), (None, True), (None, False)])
def test_a_colbert_comes_back(tmp_path: Path, token_dim: int | None, normalize: bool) -> None:
    settings: dict[str, Any] = {"kind": "colbert", "token_dim": token_dim, "normalize": normalize}
    scorer, encoder, folder = _saved(tmp_path, "bert", **settings)
    again = load_student(StudentConfig(kind="colbert", path=str(folder)), torch.float32).eval()
    assert isinstance(again, ColBERT)
    assert again.normalize == normalize
    tokens = encoder.passages(PASSAGES)
    with torch.no_grad():
        assert torch.equal(again(tokens=tokens), scorer(tokens=tokens))
    if token_dim:
        with pytest.raises(InputError, match="late-interaction"):
            load_student(StudentConfig(path=str(folder)), torch.float32)


def test_the_original_colbert_is_read_as_sentence_transformers_reads_it(tmp_path: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    path = tiny_model(tmp_path, "bert")
    _config_of(tmp_path, "config.json", architectures=["HF_ColBERT"])
    facts = {"query_maxlen": 14, "doc_maxlen": 20, "attend_to_mask_tokens": True}
    (tmp_path / "artifact.metadata").write_text(json.dumps(facts))
    weights = load_file(tmp_path / "model.safetensors")
    published = {f"bert.{name}": x for name, x in weights.items()} | {"linear.weight": torch.randn(8, 32)}
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = StudentConfig(kind="colbert", path=path)
    scorer, encoder = load_student(config, torch.float32).eval(), load_text(config)
    assert torch.equal(scorer.backbone.embeddings.word_embeddings.weight, weights["embeddings.word_embeddings.weight"])
    _same_tokens(scorer, encoder, MultiVectorEncoder(path, device="cpu"))
    assert encoder.queries(QUERIES)["input_ids"].shape[1] == 14
    assert encoder.passages(PASSAGES)["input_ids"].shape[1] == 20


def _same_tokens(scorer: Scorer, encoder: TextEncoder, model: Any) -> None:
    """The token vectors that count are those that sentence-transformers gives."""
    with torch.no_grad():
        for texts, tokens, encode in (
            (QUERIES, encoder.queries(QUERIES), model.encode_query),
            (PASSAGES, encoder.passages(PASSAGES), model.encode_document),
        ):
            found = scorer(tokens=tokens)
            for mine, counts, theirs in zip(found, tokens["score_mask"], encode(texts), strict=True):
                torch.testing.assert_close(mine[counts.bool()], torch.as_tensor(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"query_expansion": True, "mask_punctuation": True, "query_length": 12}, {}])
def test_sentence_transformers_gives_a_colberts_token_vectors(tmp_path: Path, settings: dict[str, Any]) -> None:
    from sentence_transformers import MultiVectorEncoder

    more = {"query_prompt": "which: ", "passage_prompt": "it, ", "passage_length": 16} | settings
    scorer, encoder, folder = _saved(tmp_path, "bert", kind="colbert", token_dim=8, normalize=True, **more)
    _same_tokens(scorer, encoder, MultiVectorEncoder(str(folder), device="cpu"))
    config = StudentConfig(kind="colbert", path=str(folder))
    again, reader = load_student(config, torch.float32).eval(), load_text(config)
    for mine, theirs in ((encoder.queries(QUERIES), reader.queries(QUERIES)),):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        tokens = encoder.passages(PASSAGES)
        assert torch.equal(again(tokens=tokens), scorer(tokens=tokens))


def test_what_sentence_transformers_saves_is_read(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(tiny_model(tmp_path / "origin", "bert"))
    parts = [transformer, modules.Pooling(32, "mean"), modules.Dense(32, 20), modules.Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "which ", "document": ""})
    model.save(str(tmp_path / "st"))
    scorer, encoder = load_encoder(str(tmp_path / "st"), ["query_length=64", "passage_length=64"])
    assert (scorer.pooling, scorer.normalize, scorer.vector_width) == ("mean", True, 20)
    with torch.no_grad():
        theirs = model.encode(QUERIES, prompt_name="query", convert_to_tensor=True)
        torch.testing.assert_close(scorer.embed(encoder.queries(QUERIES)), theirs.clone(), rtol=1e-5, atol=1e-5)


def _config_of(folder: Path, name: str, **change: Any) -> None:
    file = folder / name
    tree = json.loads(file.read_text())
    tree = tree | change if isinstance(tree, dict) else change["modules"](tree)
    file.write_text(json.dumps(tree))


def test_modules_that_would_change_the_vectors_are_refused(tmp_path: Path) -> None:
    _, _, folder = _saved(tmp_path, "bert", projection=8)
    config = StudentConfig(path=str(folder))
    with pytest.raises(InputError, match="projection: 9 requested of a model that comes with one to 8"):
        load_student(StudentConfig(path=str(folder), projection=9), torch.float32)
    _config_of(folder, "2_Dense/config.json", activation_function="os.system")
    with pytest.raises(InputError, match=r"activation os\.system is not supported"):
        load_student(config, torch.float32)
    _config_of(folder, "modules.json", modules=lambda tree: [*tree, {"path": "9_X", "type": "some.where.LSTM"}])
    with pytest.raises(InputError, match=r"module some\.where\.LSTM is code of its own"):
        load_student(config, torch.float32)
    _config_of(folder, "modules.json", modules=lambda tree: [{"path": "../..", "type": "a.Transformer"}])
    with pytest.raises(InputError, match="leaves the directory"):
        load_student(config, torch.float32)


@pytest.mark.parametrize("mode", ["max", "weightedmean", "mean_sqrt_len_tokens", ["cls", "max"]])
def test_every_pooling_is_sentence_transformers_own(tmp_path: Path, mode: Any) -> None:
    from sentence_transformers import SentenceTransformer

    _, _, folder = _saved(tmp_path, "qwen3")
    _config_of(folder, "1_Pooling/config.json", pooling_mode=mode)
    scorer, encoder = load_encoder(str(folder))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(PASSAGES, convert_to_tensor=True)
    with torch.no_grad():
        torch.testing.assert_close(scorer.embed(encoder.passages(PASSAGES)), theirs.clone(), rtol=1e-5, atol=1e-5)
        assert scorer.vector_width == theirs.shape[1]
        layers = scorer(tokens=encoder.passages(PASSAGES), layers=(0, scorer.num_layers - 1))
    torch.testing.assert_close(layers[1], layers[2], rtol=1e-5, atol=1e-5)  # the last layer's vector is the final one


def test_a_batch_runs_after_loading(tmp_path: Path) -> None:
    scorer, encoder, _ = _saved(tmp_path, "modernbert", projection=8)
    batch = ModelBatch(group_size=1, queries=encoder.queries(QUERIES), passages=encoder.passages(PASSAGES))
    out = scorer(batch, layers=(0, 2))
    assert out.layers.q_KQD.shape == (2, 3, 8)
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / "saved"), transformers.ModernBertModel)
