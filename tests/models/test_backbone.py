"""What cannot be loaded is told in one line, before anything runs; what can is deterministic and safe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.errors import InputError
from lead_ds.io import hub
from lead_ds.models.load import load_student, load_teacher, read_model_config
from tests.models.tiny_models import tiny_config, tiny_model, tokens_of


def _refused(match: str, config: StudentConfig | TeacherConfig) -> None:
    with pytest.raises(InputError, match=match) as error:
        (load_teacher if isinstance(config, TeacherConfig) else load_student)(config, torch.float32)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_models(tmp_path: Path) -> None:
    _refused("no such model directory", StudentConfig(path=str(tmp_path / "absent")))
    _refused(r"not a model: it has no config\.json", StudentConfig(path=str(tmp_path)))
    (tmp_path / "file").write_text("x")
    _refused("not a model directory but a file", StudentConfig(path=str(tmp_path / "file")))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    _refused("not a complete model", StudentConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    _refused("cannot be loaded", StudentConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bart", "is_encoder_decoder": true}')
    _refused("bart is an encoder-decoder", StudentConfig(path=str(tmp_path)))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub._hub_answers.cache_clear()
    yield
    hub._hub_answers.cache_clear()


@pytest.mark.timeout(120)  # every file would be tried again for half a minute
@pytest.mark.usefixtures("no_hub")
def test_a_hub_that_is_away_is_told_at_once() -> None:
    _refused("not found on the hub", StudentConfig(path="lead-ds-tests/no-such-model"))


def test_pickled_weights_only_with_leave(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    _refused("pickle only.*allow_pickle: true", StudentConfig(path=path))
    student = load_student(StudentConfig(path=path, allow_pickle=True), torch.float32)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(student.backbone.get_parameter(name), weights[name])


def test_damaged_and_foreign_weights(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    _refused("damaged weights", StudentConfig(path=path))
    weights = {"encoder.layer.0.attention.self.query.weight": torch.zeros(32, 32)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _refused(r"its weights lack \d+ parameters of a bert, such as", StudentConfig(path=path))
    tiny_model(tmp_path / "other", "bert", intermediate_size=64)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "model.safetensors")
    _refused("weights of other shapes than its config.json gives", StudentConfig(path=path))


def test_remote_code_only_with_leave(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert")
    tree = json.loads((tmp_path / "config.json").read_text())
    tree |= {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _refused("Python code of its own.*trust_remote_code", StudentConfig(path=path))
    assert not (tmp_path / "ran").exists()


def test_a_teacher_needs_a_trained_head_and_a_student_gets_a_new_one(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert")
    _refused("without a trained scoring head", TeacherConfig(kind="cross_encoder", path=path))
    student = load_student(StudentConfig(kind="cross_encoder", path=path), torch.float32)
    assert student.model.config.num_labels == 1
    assert student(tokens=tokens_of((4, 6))).shape == (2,)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["architectures"] = ["BertForSequenceClassification"]  # claims a head; its weights have none
    (tmp_path / "config.json").write_text(json.dumps(tree))
    _refused("without a trained scoring head", TeacherConfig(kind="cross_encoder", path=path))


def test_a_head_of_three_labels_without_names_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "roberta", "classifier", labels=3)
    _refused(
        "which of its labels means relevant is not clear.*set relevant_label",
        TeacherConfig(kind="cross_encoder", path=path),
    )


def test_a_decoder_saved_without_its_language_model_head_is_no_reranker(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama")
    config = TeacherConfig(kind="llm_reranker", path=path, yes_token="y", no_token="n")
    _refused("lack the language-model head", config)


def test_the_attention_backend_is_the_one_asked_for(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert")
    assert load_student(StudentConfig(path=path), torch.float32).backbone.config._attn_implementation == "sdpa"
    eager = load_student(StudentConfig(path=path, attention="eager"), torch.float32)
    assert eager.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["dual_encoder", "colbert", "cross_encoder"])
def test_random_weights_need_a_configuration_only(tmp_path: Path, kind: Any) -> None:
    tiny_config("modernbert").save_pretrained(tmp_path)
    config = TeacherConfig(kind=kind, path=str(tmp_path), weights="random")
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(load_teacher(config, torch.bfloat16))
    same, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert any(not torch.equal(same[name], other[name]) for name in same)
    assert {x.dtype for x in same.values()} == {torch.bfloat16}


def test_a_checkpoint_saved_with_a_head_serves_as_a_dual_encoder(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama", "causal")
    weights = load_file(tmp_path / "model.safetensors")
    scorer = load_student(StudentConfig(path=path), torch.float32)
    assert torch.equal(scorer.backbone.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert scorer.pooling == "last"
    assert read_model_config(StudentConfig(path=path)).num_hidden_layers == scorer.num_layers


def test_a_rank_that_is_lost_while_a_model_is_loaded_is_no_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong input ends with status 2, which no launcher tries again."""
    import transformers

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:18351")

    folder = tiny_model(tmp_path / "bert", "bert")
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", gone)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        load_student(StudentConfig(path=str(folder)), torch.float32)
