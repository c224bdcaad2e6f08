"""`lead-ds inspect`: what it says of models as their own libraries saved them, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lead_ds.cli.main import main
from lead_ds.errors import InputError
from lead_ds.models.load import kind_of
from tests.helpers.rooms import save_bert
from tests.models.tiny_models import tiny_model


def run(*arguments: object) -> tuple[int, str, str]:
    """Status, output and standard error of `inspect`, run in this process."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(["inspect", *(str(x) for x in arguments)])
    return int(end.value.code or 0), out.getvalue(), told.getvalue()


def facts_of(*arguments: object, status: int = 0) -> dict[str, Any]:
    code, out, told = run(*arguments, "--json")
    assert code == status, told
    return json.loads(out)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with mean pooling, a Dense layer and prompts, saved by sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    root = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    modules = [Transformer(tiny_model(root / "bert", "bert")), Pooling(32, "mean"), Dense(32, 24)]
    model = SentenceTransformer(
        modules=modules, prompts={"query": "which: ", "document": "the passage: "}, similarity_fn_name="cosine"
    )
    model.save_pretrained(str(root / "saved"))
    return root / "saved"


def test_a_dual_encoder_as_sentence_transformers_saved_it(encoder: Path, rooms: Path) -> None:
    facts = facts_of(encoder, "--data", rooms / "data", "--compare")
    assert (facts["kind"], facts["layers"], facts["width"]) == ("dual_encoder", 3, 32)
    assert facts["kind_from"] == "config_sentence_transformers.json: SentenceTransformer of sentence-transformers"
    assert facts["architecture"] == "BertModel"
    assert facts["weights"] == ["F32"]
    assert facts["modules"] == ["Pooling (mean)", "Dense (32 to 24, Tanh)"]
    assert (facts["pooling"], facts["normalize"], facts["vector_width"]) == ("mean", False, 24)
    assert facts["prompts"] == {"query": "which: ", "passage": "the passage: "}
    assert facts["lengths"]["passage_length"] == {"tokens": 130, "from": "the model's files"}
    assert facts["lengths"]["query_length"] == {"tokens": 130, "from": "the model's files"}
    assert facts["similarity"] == {"files": "cosine", "computed": "cosine"}
    tokens = facts["tokens"]["query"]
    assert tokens[0] == ["[CLS]", "special"]
    assert tokens[-1] == ["[SEP]", "special"]
    assert [token for token, role in tokens if role == "prompt"] == [
        "which",
        "[UNK]",
    ]  # the colon is not in its vocabulary
    assert facts["compared"]["by_its_files"]
    assert facts["compared"]["equal"]
    assert facts["compared"]["difference"] < 2e-5
    assert facts["cut"]["passages"]["texts"] == 60
    assert facts["cut"]["passages"]["cut"] == 0


def test_settings_win_and_show_as_a_difference(encoder: Path, rooms: Path) -> None:
    settings = ("passage_length=12", "query_length=12", "query_prompt=", "passage_prompt=", "normalize=true")
    facts = facts_of(encoder, *settings, "--data", rooms / "data", "--compare", status=1)
    assert facts["lengths"]["query_length"] == {"tokens": 12, "from": "settings"}
    assert facts["similarity"] == {"files": "cosine", "computed": "cosine"}
    assert not facts["compared"]["equal"]
    cut = facts["cut"]["passages"]
    assert cut["cut"] == 1
    assert cut["longest"] > 12
    assert cut["lost"] == pytest.approx((cut["tokens"] - 12 * 60) / cut["tokens"])


def test_a_prompt_that_leaves_nothing_of_a_text(encoder: Path) -> None:
    status, out, told = run(
        encoder, "query_length=10", "query_prompt=what is the name of the thing that we have in mind: "
    )
    assert (status, out) == (2, "")
    assert told.startswith("error: query_length: is 10, and its prompt leaves 0 tokens of a text (raise it to ")
    least = int(told.split("raise it to ")[1].split()[0])
    facts_of(encoder, f"query_length={least}", "query_prompt=what is the name of the thing that we have in mind: ")


def test_for_people(encoder: Path) -> None:
    status, out, _ = run(encoder)
    assert status == 0
    for words in ("dual_encoder", "Pooling (mean)", "'which: '", "its files name cosine", "[CLS]", "130 tokens"):
        assert words in out


def test_a_cross_encoder(tmp_path: Path, rooms: Path) -> None:
    path = save_bert(tmp_path / "cross", layers=2, width=32, head=True)
    facts = facts_of(path, "max_length=128", "--compare", "--data", rooms / "data")
    assert (facts["kind"], facts["kind_from"]) == ("cross_encoder", "config.json: BertForSequenceClassification")
    assert facts["lengths"] == {"max_length": {"tokens": 128, "from": "settings"}}
    assert [token for token, _ in facts["tokens"]["pair"]].count("[SEP]") == 2
    assert facts["compared"]["equal"], facts["compared"]
    assert facts["cut"]["pairs"]["texts"] == 50
    assert facts_of(path)["lengths"] == {"max_length": {"tokens": 128, "from": "the model's files"}}
    status, out, told = run(path, "max_length=256")
    assert (status, out) == (2, "")
    assert told == f"error: {path}: max_length is 256, the model has 128 positions (set max_length to at most 128)\n"


def test_a_colbert(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["HF_ColBERT"]}))
    (tmp_path / "artifact.metadata").write_text(json.dumps({"query_maxlen": 14, "doc_maxlen": 20}))
    weights = {f"bert.{name}": x for name, x in load_file(tmp_path / "model.safetensors").items()}
    weights["linear.weight"] = torch.randn(8, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    facts = facts_of(path, "--compare")
    assert (facts["kind"], facts["vector_width"]) == ("colbert", 8)
    assert "config.json" in facts["kind_from"]
    assert facts["lengths"]["query_length"] == {"tokens": 14, "from": "the model's files"}
    assert len(facts["tokens"]["query"]) == 14
    assert facts["tokens"]["query"][-1] == ["[MASK]", "expansion"]
    assert facts["compared"]["equal"], facts["compared"]


def test_a_language_model_is_never_guessed(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama", "causal")
    status, out, told = run(path)
    assert (status, out) == (2, "")
    assert told.startswith(f"error: {path}: is a language model (LlamaForCausalLM)")
    assert "set kind=K, one of colbert" in told
    assert len(told.splitlines()) == 1
    with pytest.raises(InputError, match="is a language model"):
        kind_of(path)
    answers = ("yes_token=y", "no_token=n", "max_length=130")
    facts = facts_of(path, "--kind", "llm_reranker", *answers)
    assert (facts["kind"], facts["kind_from"]) == ("llm_reranker", "settings")
    assert facts["template"].startswith("<Instruct>")
    assert not facts["can_be_student"]
    status, _, told = run(path, "--kind", "llm_reranker", *answers, "--compare")
    assert status == 2
    assert "decoder reranker" in told


def test_a_reference_that_fails_is_one_line(tmp_path: Path) -> None:
    # RoBERTa's positions start at two: sentence-transformers cuts at 130 tokens, where 128 fit.
    path = tiny_model(tmp_path, "xlm-roberta", "classifier", labels=2)
    status, out, told = run(path, "max_length=100", "--compare")
    assert (status, out) == (2, "")
    assert told.startswith(f"error: {path}: sentence-transformers cannot read it: ")
    assert len(told.splitlines()) == 1


def test_sharded_weights_of_16_bits_and_a_tokenizer_without_padding(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoModel

    path = tiny_model(tmp_path / "origin", "qwen3")
    model = SentenceTransformer(modules=[Transformer(path), Pooling(32, "lasttoken"), Normalize()])
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    (tmp_path / "saved" / "model.safetensors").unlink()
    AutoModel.from_pretrained(path).to(torch.bfloat16).save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    facts = facts_of(tmp_path / "saved")
    assert (facts["weights"], facts["read_as"], facts["pooling"]) == (["BF16"], "bf16", "last")
    facts = facts_of(tmp_path / "saved", "--compare")
    assert facts["compared"]["equal"], facts["compared"]


def broken(folder: Path, what: str) -> None:
    """Do harm to a copy of a good model."""
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "damaged weights":
        (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "lost weights":
        weights = load_file(folder / "model.safetensors")
        weights.pop("encoder.layer.0.output.dense.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif what == "no JSON":
        (folder / "config.json").write_text("{")
    elif what == "other shapes":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"vocab_size": 400', '"vocab_size": 300'))


@pytest.mark.parametrize(
    "what",
    ["no config", "damaged weights", "no weights", "lost weights", "no tokenizer", "no JSON", "other shapes"],
)
def test_a_broken_directory_is_one_line(tmp_path: Path, rooms: Path, what: str) -> None:
    folder = Path(shutil.copytree(rooms / "student", tmp_path / "model"))
    broken(folder, what)
    status, out, told = run(folder, "--json")
    assert (status, out) == (2, "")
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1, told
    assert what != "other shapes" or "weights of other shapes than its config.json gives" in told


def test_lengths_that_leave_nothing_are_refused(rooms: Path) -> None:
    for model, setting in (("cross", "max_length=4"), ("bert", "query_length=2"), ("bert", "passage_length=2")):
        status, out, told = run(rooms / model, setting)
        assert (status, out) == (2, "")
        assert f"error: {setting.replace('=', ': is ')}, and all " in told


def test_a_setting_and_a_kind_that_are_none(rooms: Path) -> None:
    for arguments, words in (
        (("pooling=max",), "pooling"),
        (("max_length=9",), "set query_length and passage_length"),
        (("--kind", "encoder"), "dual_encoder"),
    ):
        status, _, told = run(rooms / "student", *arguments)
        assert status == 2
        assert words in told
        assert len(told.splitlines()) == 1


def test_tokens_without_an_embedding_are_told(rooms: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(rooms / "student", tmp_path / "model")
    assert not [note for note in facts_of(folder)["notes"] if "embedding" in note]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"later{i}" for i in range(rows)])
    tokenizer.save_pretrained(folder)
    [note] = [note for note in facts_of(folder)["notes"] if "embedding" in note]
    assert f"{len(tokenizer) - rows} of its tokens have no embedding, from 'later" in note
