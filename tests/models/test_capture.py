"""Captured layers are the layers: against output_hidden_states, with gradient, checkpointed, compiled, padded."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from lead_ds.config import StudentConfig
from lead_ds.data.reads import ModelBatch
from lead_ds.errors import InputError
from lead_ds.models.kinds.dual_encoder import DualEncoder
from lead_ds.models.load import load_student
from tests.models.tiny_models import DECODERS, FAMILIES, tiny_model, tokens_of

LENGTHS = (5, 12, 9)
PASSAGES = (15, 4, 7, 11, 6, 13)


def _encoder(folder: Path, family: str, pooling: str = "cls", **more: object) -> DualEncoder:
    path = tiny_model(folder, family)
    scorer = load_student(StudentConfig(path=path, pooling=pooling, **more), torch.float32)
    assert isinstance(scorer, DualEncoder)
    return scorer


def _batch(pad: int = 0) -> ModelBatch:
    queries, passages = tokens_of(LENGTHS), tokens_of(PASSAGES, seed=1)
    for tokens in (queries, passages):
        tokens["input_ids"][tokens["attention_mask"] == 0] = pad
    return ModelBatch(group_size=2, queries=queries, passages=passages)


def _reference(scorer: DualEncoder, tokens: dict[str, Tensor]) -> list[Tensor]:
    """Every layer's states by transformers' own means, through the final norm where there is one outside the layers."""
    model = transformers.AutoModel.from_pretrained(scorer.config.path).eval()
    out = model(**tokens, output_hidden_states=True)
    norm = getattr(model, "norm", None) or getattr(model, "final_norm", None)
    inner = [state if norm is None else norm(state) for state in out.hidden_states[1:-1]]
    return [*inner, out.last_hidden_state]


def _pooled(states_BLD: torch.Tensor, mask_BL: torch.Tensor, pooling: str) -> torch.Tensor:
    """One state of each text, by hand."""
    texts = [states[mask.bool()] for states, mask in zip(states_BLD, mask_BL, strict=True)]
    pick = {"cls": lambda text: text[0], "last": lambda text: text[-1], "mean": lambda text: text.mean(0)}[pooling]
    return torch.stack([pick(text) for text in texts])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_transformers_own_hidden_states(tmp_path: Path, family: str, pooling: str) -> None:
    scorer = _encoder(tmp_path, family, pooling).eval()
    batch = _batch(1 if "roberta" in family else 0)
    with torch.no_grad():
        out = scorer(batch, layers=range(3))
        for tokens, features in ((batch.queries, out.layers.q_KQD), (batch.passages, out.layers.p_KPD)):
            for state, mine in zip(_reference(scorer, tokens), features, strict=True):
                expected = _pooled(state, tokens["attention_mask"], pooling)
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.layers.q_KQD[-1], out.final.q_KQD[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(out.final.p_KPD[0], scorer.embed(batch.passages), rtol=0, atol=0)


def _gradients(scorer: DualEncoder, batch: ModelBatch) -> dict[str, Tensor]:
    scorer.zero_grad()
    torch.manual_seed(5)
    out = scorer(batch, layers=(0, 2))
    weights = torch.tensor([1.0, -2.0])[:, None, None]
    loss = (out.layers.relevance().logits * weights).square().mean() + out.final.relevance().logits.logsumexp(-1).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "roberta", "modernbert", "qwen3", "gemma3_text", "deberta-v2"]
)
def test_gradient_through_captured_layers_survives_checkpointing(tmp_path: Path, family: str) -> None:
    scorer = _encoder(tmp_path, family, "mean")
    scorer.eval()
    batch = _batch(1 if "roberta" in family else 0)
    plain = _gradients(scorer, batch)
    assert any("layers.0" in name or "layer.0" in name for name in plain)
    scorer.gradient_checkpointing_enable()
    scorer.train()  # which switches checkpointing on, and dropout's noise, which would tell the two apart
    _no_dropout(scorer)
    calls = []
    layer = scorer.capture.layers[1]
    hook = next(iter(layer.children())).register_forward_hook(lambda *_: calls.append(1))
    checkpointed = _gradients(scorer, batch)
    hook.remove()
    assert len(calls) == 4, "each of two texts' forwards is run again in the backward pass"
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=partial("{}: {}".format, name)
        )


def _no_dropout(scorer: DualEncoder) -> None:
    for module in scorer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize(
    ("family", "how", "backend"),
    [
        ("bert", "layers", "aot_eager"),
        ("bert", "backbone", "eager"),
        ("bert", "scorer", "eager"),
        pytest.param("modernbert", "layers", "aot_eager", marks=pytest.mark.slow),
        pytest.param("modernbert", "scorer", "aot_eager", marks=pytest.mark.slow),
        pytest.param("qwen3", "layers", "aot_eager", marks=pytest.mark.slow),
        pytest.param("qwen3", "backbone", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_capture_survives_compile(tmp_path: Path, family: str, how: str, backend: str) -> None:
    torch._dynamo.reset()
    scorer = _encoder(tmp_path, family, "mean").eval()
    batch = _batch()
    plain = _gradients(scorer, batch)
    with torch.no_grad():
        others = scorer(batch, layers=(1,)).layers.q_KQD
    run = scorer
    if how == "layers":
        scorer.compile_layers(backend=backend)
    elif how == "backbone":
        scorer.backbone.compile(backend=backend)
    else:
        run = torch.compile(scorer, backend=backend)
    for name, gradient in _gradients(run, batch).items():
        torch.testing.assert_close(
            gradient, plain[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, name)
        )
    with torch.no_grad():  # another selection after the first compilation
        torch.testing.assert_close(run(batch, layers=(1,)).layers.q_KQD, others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_longer_neighbours_change_nothing(tmp_path: Path, family: str, pooling: str) -> None:
    scorer = _encoder(tmp_path, family, pooling).eval()
    pad = 1 if "roberta" in family else 0
    alone, among = tokens_of(LENGTHS), tokens_of(LENGTHS, width=40)
    for tokens in (alone, among):
        tokens["input_ids"][tokens["attention_mask"] == 0] = pad
    with torch.no_grad():
        near = scorer(ModelBatch(group_size=1, queries=alone, passages=alone), layers=(0, 1)).layers.q_KQD
        far = scorer(ModelBatch(group_size=1, queries=among, passages=among), layers=(0, 1)).layers.q_KQD
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_side_changes_nothing(tmp_path: Path, family: str, pooling: str) -> None:
    scorer = _encoder(tmp_path, family, pooling).eval()
    with torch.no_grad():
        right, left = (scorer.embed(tokens_of(LENGTHS, width=20, side=side)) for side in ("right", "left"))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_an_index_out_of_range_names_the_model(tmp_path: Path) -> None:
    scorer = _encoder(tmp_path, "bert")
    with pytest.raises(InputError, match=r"layer 3 was requested of a model with 3 layers \(0 to 2\)") as error:
        scorer(_batch(), layers=(0, 3))
    assert str(tmp_path) in str(error.value)


def test_an_error_inside_a_hook_is_raised_after_the_forward(tmp_path: Path) -> None:
    scorer = _encoder(tmp_path, "bert")
    ran = []
    scorer.capture.layers[2].register_forward_hook(lambda *_: ran.append(2))

    def fails(state: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), scorer.capture.reading((0,), fails):
        scorer.backbone(**tokens_of(LENGTHS))
    assert ran == [2]
    assert scorer(_batch(), layers=(1,)).layers.q_KQD.shape == (1, 3, 32)


def test_no_whole_hidden_state_stays_alive(tmp_path: Path) -> None:
    scorer = _encoder(tmp_path, "bert").eval()
    with torch.no_grad():
        out = scorer(_batch(), layers=(0, 1, 2))
    assert out.layers.q_KQD.untyped_storage().nbytes() == 4 * 32 * 4 * len(LENGTHS)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gemma3_text", "qwen3"])
def test_a_shallower_student_keeps_the_layers_it_is_told_to(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path / "deep", family, layers=4)
    kept = [0, 3]
    scorer = load_student(StudentConfig(path=path, layers=kept), torch.float32).eval()
    whole = load_student(StudentConfig(path=path), torch.float32).eval()
    assert scorer.num_layers == scorer.backbone.config.num_hidden_layers == 2
    for mine, theirs in zip(scorer.capture.layers, (whole.capture.layers[i] for i in kept), strict=True):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    types = getattr(whole.backbone.config, "layer_types", None)
    if types:
        assert scorer.backbone.config.layer_types == [types[i] for i in kept]
    scorer.model.save_pretrained(tmp_path / "shallow")
    again = transformers.AutoModel.from_pretrained(tmp_path / "shallow").eval()
    tokens = tokens_of(LENGTHS)
    with torch.no_grad():
        mine = scorer.backbone(**scorer._inputs(tokens)).last_hidden_state
        theirs = again(**tokens).last_hidden_state
    assert torch.equal(mine[tokens["attention_mask"] == 1], theirs[tokens["attention_mask"] == 1])


def test_a_modernbert_cut_without_its_first_layer_loads_again(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "deep", "modernbert", layers=4)
    scorer = load_student(StudentConfig(path=path, layers=[1, 3]), torch.float32).eval()
    scorer.model.save_pretrained(tmp_path / "shallow")
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "shallow", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with pytest.raises(InputError, match="layer 4 was requested of a model with 4 layers"):
        load_student(StudentConfig(path=path, layers=[0, 4]), torch.float32)


def test_hooks_that_were_taken_away_stand_behind_those_of_others(tmp_path: Path) -> None:
    scorer, seen = _encoder(tmp_path, "bert").eval(), []
    with torch.no_grad():
        before = scorer(tokens=tokens_of(LENGTHS), layers=[0, 2])
    scorer.capture.uninstall()
    layers = scorer.capture.layers
    assert not any(layer._forward_hooks for layer in layers)
    layers[0].register_forward_hook(lambda *_: seen.append(len(scorer.capture._states)))
    with torch.no_grad():
        assert torch.equal(scorer(tokens=tokens_of(LENGTHS), layers=[0, 2]), before)
    assert seen == [0], "nothing was captured before the other's hook ran"
