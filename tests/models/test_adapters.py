"""Adapters: read as transformers and peft read them, or refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lead_ds.config import TeacherConfig
from lead_ds.errors import InputError
from lead_ds.io.files import model_checksum, model_files
from lead_ds.io.located import located
from lead_ds.models.inspection import inspect_model
from lead_ds.models.load import kind_of, load_encoder, load_scorer, load_teacher
from lead_ds.models.reference import TEXTS, compare
from lead_ds.teachers.frozen import FrozenTeacher
from tests.formats.vectors import late
from tests.helpers.launch import launch
from tests.helpers.tiny import tiny_tokenizer
from tests.models.tiny_models import tiny_model, tokens_of

peft = pytest.importorskip("peft")

_HEADS: dict[str, Any] = {
    "base": transformers.AutoModel,
    "classifier": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LEAD_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def adapt(base: str, folder: Path, head: str = "base", settings: Any = None, **more: Any) -> str:
    """Save an adapter of random weights, on top of `base`."""
    torch.manual_seed(3)
    model = _HEADS[head].from_pretrained(base, **({"num_labels": 1} if head == "classifier" else {}))
    settings = settings or peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **more})
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return str(folder)


def said(path: str, base: str, head: str = "base") -> Any:
    """The model as peft reads it, not merged."""
    model = _HEADS[head].from_pretrained(base, **({"num_labels": 1} if head == "classifier" else {}))
    return peft.PeftModel.from_pretrained(model, path).eval()


def states(path: str, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Final token states of our scorer."""
    scorer, _ = load_encoder(path, ["pooling=mean"])
    with torch.no_grad():
        return scorer.run(tokens, [], lambda state: state, through_norm=True)[-1]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("bert", {}),
        ("modernbert", {"use_rslora": True}),
        ("qwen3", {"use_dora": True, "task_type": "FEATURE_EXTRACTION"}),
        ("bert", {"settings": "ia3"}),
        ("bert", {"settings": "loha"}),
        ("bert", {"modules_to_save": ["word_embeddings"], "bias": "all"}),
        ("qwen3", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [50, 60]}),
        ("qwen3", {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        ("bert", {"target_modules": ["query", "value"], "lora_bias": True, "layers_to_transform": [0, 2]}),
    ],
)
def test_an_adapter_is_merged_as_peft_reads_it(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    base, given = tiny_model(tmp_path / "base", family), dict(more)
    if more.get("settings") == "ia3":
        given["settings"] = peft.IA3Config(target_modules=["query", "value"], feedforward_modules=[])
    elif more.get("settings") == "loha":
        given["settings"] = peft.LoHaConfig(r=4, target_modules=["query", "value"])
    path = adapt(base, tmp_path / "adapter", **given)
    tokens = tokens_of((5, 9))
    tokens = {name: x for name, x in tokens.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = said(path, base)(**tokens).last_hidden_state
        alone = transformers.AutoModel.from_pretrained(base)(**tokens).last_hidden_state
    kept = tokens["attention_mask"].bool()
    torch.testing.assert_close(states(path, tokens)[kept], theirs[kept], rtol=0, atol=2e-5)
    assert float((theirs - alone)[kept].abs().max()) > 1e-3


@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
def test_an_adapter_that_brings_new_words(tmp_path: Path, saved: list[str] | None) -> None:
    base = tiny_model(tmp_path / "base", "qwen3")
    model = transformers.AutoModel.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokens = tokens_of((7, 7))
    tokens["input_ids"][0, 0] = model.config.vocab_size - 1
    with torch.no_grad():
        theirs = adapted(**tokens).last_hidden_state
    torch.testing.assert_close(states(str(tmp_path / "adapter"), tokens), theirs, rtol=0, atol=2e-5)


def test_a_head_that_the_adapter_brings(tmp_path: Path) -> None:
    """RankLLaMA's form: a language model as base, a score layer in the adapter."""
    base = tiny_model(tmp_path / "base", "llama", "causal")
    path = adapt(base, tmp_path / "adapter", "classifier", task_type="SEQ_CLS")
    tokens = tokens_of((5, 9))
    tokens["input_ids"][tokens["attention_mask"] == 0] = 0
    scorer, _ = load_scorer(path, settings=["max_length=64"])
    assert scorer.name == "cross_encoder"
    with torch.no_grad():
        theirs = said(path, base, "classifier")(**tokens).logits[:, 0]
        torch.testing.assert_close(scorer(tokens=tokens), theirs, rtol=0, atol=2e-5)


def test_an_adapter_of_an_encoder_half(tmp_path: Path) -> None:
    """Of sentence-t5's form: trained on T5's encoder alone, whose base has a decoder as well."""
    base, shape = tiny_tokenizer(tmp_path / "base", "unigram"), {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    ends = {"vocab_size": 400, "num_layers": 2, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, **ends)).save_pretrained(base)
    encoder = transformers.T5EncoderModel.from_pretrained(base)
    settings = peft.LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False)
    adapted = peft.get_peft_model(encoder, settings).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokens = {name: x for name, x in tokens_of((5, 9)).items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = adapted(**tokens).last_hidden_state
    kept = tokens["attention_mask"].bool()
    torch.testing.assert_close(states(str(tmp_path / "adapter"), tokens)[kept], theirs[kept], rtol=0, atol=2e-5)


def test_an_adapter_of_a_language_model_names_no_kind(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", "causal")
    path = adapt(base, tmp_path / "adapter", "causal", task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="no file says how it retrieves"):
        kind_of(path)
    config = TeacherConfig(kind="llm_reranker", path=path, yes_token="y", no_token="n")
    scorer = load_teacher(config, torch.float32)
    tokens = tokens_of((5, 9))
    with torch.no_grad():
        whole = said(path, base, "causal").base_model(**tokens, output_hidden_states=True).hidden_states[-1]
        ours = scorer.run(tokens, [], lambda state: state, through_norm=True)[-1]
    kept = tokens["attention_mask"].bool()
    torch.testing.assert_close(ours[kept], whole[kept], rtol=0, atol=2e-5)


def dense_adapter(folder: Path) -> tuple[str, str]:
    """As sentence-transformers saves one, and its base: modules, prompts and tokenizer of its own, no weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    base = tiny_model(folder / "base", "bert")
    modules = [Transformer(base), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "ask: "}).save_pretrained(str(folder / "adapter"))
    return without_weights(folder / "adapter", base), base


def late_adapter(folder: Path) -> tuple[str, str]:
    """Of a late-interaction model, whose projection stands beside it whole."""
    base = tiny_model(folder / "base", "bert", layers=2)
    return without_weights(Path(late(folder)), base), base


def pair_adapter(folder: Path) -> tuple[str, str]:
    """Of a cross-encoder, whose scoring head the adapter brings, on an encoder that has none."""
    base = tiny_model(folder / "base", "bert")
    return adapt(base, folder / "adapter", "classifier", task_type="SEQ_CLS", modules_to_save=["classifier"]), base


def without_weights(path: Path, base: str) -> str:
    """An adapter of `base` in place of the weights in a folder."""
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
    return adapt(base, path)


def test_modules_beside_an_adapter_are_honoured(tmp_path: Path) -> None:
    path, base = dense_adapter(tmp_path)
    found = inspect_model(path)
    assert (found.facts["pooling"], found.facts["prompts"]["query"]) == ("mean", "ask: ")
    assert found.facts["adapter"] == {"type": "LORA", "base": base, "r": 4, "with": []}


@pytest.mark.parametrize("made", [dense_adapter, late_adapter, pair_adapter])
def test_compare_has_peft_compute_the_weights(tmp_path: Path, made: Any) -> None:
    path, _ = made(tmp_path)
    found = inspect_model(path, ["dtype=fp32"])
    told = compare(found.scorer, found.encoder, TEXTS[:6])
    assert told["equal"], told
    copy = Path(located(path)) / "model.safetensors"  # it is not our merged copy that is compared with itself
    save_file({name: 1.01 * x for name, x in load_file(copy).items()}, copy, metadata={"format": "pt"})
    spoiled = inspect_model(path, ["dtype=fp32"])
    assert not compare(spoiled.scorer, spoiled.encoder, TEXTS[:6])["equal"]


def test_a_base_at_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's cache holds two of them; `revision` is of the base."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home, bases = tmp_path / "hub" / "models--someone--base", {}
    (home / "refs").mkdir(parents=True)
    for number, name in enumerate(("main", "tuned")):
        commit = f"{number}" * 40
        bases[name] = tiny_model(home / "snapshots" / commit, "bert", seed=number)
        (home / "refs" / name).write_text(commit)
    path = adapt(bases["tuned"], tmp_path / "adapter")
    _edited(path, base_model_name_or_path="someone/base", revision="tuned")
    tokens = tokens_of((7, 7))
    with torch.no_grad():
        theirs = said(path, bases["tuned"])(**tokens).last_hidden_state
    torch.testing.assert_close(states(path, tokens), theirs, rtol=0, atol=2e-5)
    _edited(path, revision="gone")
    with pytest.raises(InputError, match="its base model someone/base is no folder here"):
        load_encoder(path)


def test_modules_of_the_base_serve_an_adapter_without(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    plain = tiny_model(tmp_path / "plain", "bert")
    base = str(tmp_path / "base")
    SentenceTransformer(modules=[Transformer(plain), Pooling(32, "max")]).save_pretrained(base)
    path = adapt(base, tmp_path / "adapter")
    assert inspect_model(path).facts["pooling"] == "max"


def test_base_weights_beside_an_adapter_are_its_base(tmp_path: Path) -> None:
    """As transformers reads such a directory, whatever base_model_name_or_path says."""
    base = tiny_model(tmp_path / "base", "bert")
    adapter = Path(adapt(base, tmp_path / "adapter"))
    both = shutil.copytree(base, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, both / name)
    tokens = tokens_of((5, 9))
    with torch.no_grad():
        theirs = said(str(adapter), base)(**tokens).last_hidden_state
    tiny_model(tmp_path / "base", "bert", seed=5)
    kept = tokens["attention_mask"].bool()
    torch.testing.assert_close(states(str(both), tokens)[kept], theirs[kept], rtol=0, atol=2e-5)


def test_the_base_is_found_from_here_and_from_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "models" / "base", "bert")
    adapter = Path(adapt(base, tmp_path / "models" / "adapter"))
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())

    def name(where: str) -> None:
        file.write_text(json.dumps(settings | {"base_model_name_or_path": where}))

    monkeypatch.chdir(tmp_path)
    name("../base")
    assert load_encoder(str(adapter))[0].num_layers == 3
    monkeypatch.chdir(tmp_path / "models")
    name("base")
    assert load_encoder("adapter")[0].num_layers == 3
    shutil.copytree("base", adapter / "base")
    with pytest.raises(InputError, match="one folder from here and another one"):
        load_encoder("adapter")
    for missing, what in (("../gone", "is not there"), ("some/model", "not found on the hub"), ("", "no base")):
        name(missing)
        with pytest.raises(InputError, match=what):
            load_encoder("adapter")


def test_precision_is_the_bases(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "bert")
    transformers.AutoModel.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    path = adapt(base, tmp_path / "adapter")
    assert inspect_model(path).facts["weights"] == ["BF16"]
    merged = transformers.AutoModel.from_pretrained(located(path), dtype="auto")
    theirs = said(path, base).merge_and_unload()
    for (name, ours), other in zip(merged.named_parameters(), theirs.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, other.to(torch.bfloat16), rtol=0, atol=0, msg=name)


def test_adapter_and_base_decide_what_a_run_is_made_of(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "bert")
    path = adapt(base, tmp_path / "adapter")
    files = FrozenTeacher.files(TeacherConfig(kind="dual_encoder", path=path))
    assert {"adapter_model.safetensors", "adapter_config.json", "base/model.safetensors"} <= files.keys()
    before, copy = model_checksum(path), located(path)
    other = adapt(base, tmp_path / "adapter", init_lora_weights="gaussian")
    assert model_checksum(other) != before
    assert located(other) != copy
    between = model_checksum(other)
    tiny_model(tmp_path / "base", "bert", seed=5)
    assert model_checksum(other) != between
    assert "base/config.json" in model_files(Path(other))


def _edited(adapter: str, **changes: Any) -> None:
    file = Path(adapter) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (lambda path: _edited(path, r=8), r"is \[4, 32\], its settings and base want \[8, 32\]"),
        (lambda path: _edited(path, target_modules=["nothing"]), "does not fit its base"),
        (lambda path: _edited(path, target_modules=["query"]), "does not fit its base.*want absent"),
        (lambda path: _edited(path, peft_type="UNHEARD_OF"), "type UNHEARD_OF is not known to peft"),
        (lambda path: _edited(path, made_up=True), "made_up is not known to peft"),
        (lambda path: (Path(path) / "adapter_model.safetensors").unlink(), "holds adapter_config.json and no"),
        (lambda path: (Path(path) / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (lambda path: (Path(path) / "adapter_model.safetensors").write_bytes(b"x" * 40), "peft cannot merge"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, break_it: Any, what: str) -> None:
    path = adapt(tiny_model(tmp_path / "base", "bert"), tmp_path / "adapter")
    break_it(path)
    with pytest.raises(InputError, match=what):
        load_encoder(path)


def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base", "bert")
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
    with pytest.raises(InputError, match="type PROMPT_TUNING adds to the input"):
        load_encoder(adapt(base, tmp_path / "prompts", settings=prompts))
    path = adapt(base, tmp_path / "adapter")
    torch.save({}, Path(path) / "adapter_model.bin")
    (Path(path) / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="pickle"):
        load_encoder(path)
    path, shape = adapt(base, tmp_path / "other"), Path(base) / "config.json"
    plain = shape.read_text()
    shape.write_text(json.dumps(json.loads(plain) | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InputError, match=r"its base is quantised.*as it was before, in base_model_name_or_path"):
        load_encoder(path)
    shape.write_text(plain)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"needs the package peft.*lead-ds\[adapters\]"):
        load_encoder(path)


@pytest.mark.slow
def test_a_sharded_base_gives_the_merged_models_layers(tmp_path: Path) -> None:
    """Two processes that begin at once, ZeRO-3, against peft's own model, not merged."""
    base = tiny_model(tmp_path / "base", "qwen3")
    path = adapt(base, tmp_path / "adapter")
    for answer in launch("tests.models.zero3_jobs:adapter", 2, path=path, base=base):
        assert answer["sharded"]
        assert answer["worst"] < 1e-5
        assert answer["unlike_base"] > 1e-3
