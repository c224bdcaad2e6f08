"""Attention taps on tiny random models of every family: what they record is what the model attended with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lead_ds.errors import InputError
from lead_ds.kernels import attention_kl
from lead_ds.kernels.attention_kl.reference import attention_log_probs, visible_band
from lead_ds.models.taps import AttentionTapError, tap_attention

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**_ENCODER),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, n_layers=4, n_heads=4, hidden_dim=37, vocab_size=99, max_position_embeddings=64
    ),
    "roberta": lambda: transformers.RobertaConfig(**_ENCODER),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_ENCODER),
    "electra": lambda: transformers.ElectraConfig(embedding_size=16, **_ENCODER),
    "modernbert": lambda: transformers.ModernBertConfig(
        local_attention=8, global_attn_every_n_layers=2, **_IDS, **_ENCODER
    ),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=8, **_DECODER),
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "mistral": lambda: transformers.MistralConfig(sliding_window=5, **_DECODER),
    "gemma": lambda: transformers.GemmaConfig(head_dim=16, **_DECODER),
}
B, L = 3, 19


def build(family: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(5)
    return transformers.AutoModel.from_config(FAMILIES[family](), attn_implementation=attention).eval()


def batch(padding: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (B, L), generator=generator)
    mask = torch.ones(B, L, dtype=torch.long)
    if padding == "right":
        mask[1, 12:] = 0
        mask[2, 4:] = 0
    elif padding == "left":
        mask[1, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_give_the_attention_maps_of_eager(family: str, padding: str) -> None:
    model, eager = build(family), build(family, "eager")
    inputs = batch(padding)
    with torch.no_grad(), tap_attention(model, [3, 0, 1]) as taps:
        model(**inputs)
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions
    assert list(taps) == [3, 0, 1]
    for layer, tap in taps.items():
        assert tap.mask is not None
        visible = visible_band(L, tap.causal, tap.band, tap.q.device) & (tap.mask[:, None, None, :] != 0)
        found = attention_log_probs(tap.q, tap.k, tap.scale, visible).exp()
        real = (tap.mask != 0)[:, None, :, None].expand_as(found)
        torch.testing.assert_close(found[real], maps[layer][real], atol=1e-6, rtol=0)


def test_taps_carry_windows_causality_and_grouped_keys() -> None:
    with torch.no_grad():
        with tap_attention(modern := build("modernbert"), range(4)) as local:
            modern(**batch())
        with tap_attention(mistral := build("mistral"), [2]) as sliding:
            mistral(**batch())
    assert [tap.band for tap in local.values()] == [None, 4, None, 4]
    assert sliding[2].band == 4  # mistral counts the token itself
    assert sliding[2].causal
    assert not local[0].causal
    assert sliding[2].q.shape == (B, 4, L, 8)
    assert sliding[2].k.shape == (B, 2, L, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tapping_leaves_the_model_as_it_was(attention: str) -> None:
    from transformers import AttentionInterface

    model, inputs = build("bert", attention), batch()
    entries = dict(AttentionInterface._global_mapping)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with tap_attention(model, [1]) as taps:
            during = model(**inputs).last_hidden_state
            assert model.config._attn_implementation == attention
        after = model(**inputs).last_hidden_state
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert len(taps) == 1
    assert AttentionInterface._global_mapping == entries
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_two_models_tapped_at_once_do_not_mix() -> None:
    teacher, student = build("llama"), build("bert")
    inputs = batch()
    with tap_attention(teacher, [0]) as teacher_taps:
        with tap_attention(student, [2]) as student_taps:
            student(**inputs)
        with pytest.raises(RuntimeError, match="run the model first"):
            teacher_taps[0]
        teacher(**inputs)
    assert list(teacher_taps) == [0]
    assert list(student_taps) == [2]
    with torch.no_grad(), tap_attention(student, [2]) as alone:
        student(**inputs)
    assert torch.equal(student_taps[2].q, alone[2].q)


def test_the_mask_is_found_by_position_and_may_be_absent() -> None:
    model, inputs = build("bert"), batch()
    with torch.no_grad(), tap_attention(model, [0]) as taps:
        model(inputs["input_ids"], inputs["attention_mask"])
        assert torch.equal(taps[0].mask, inputs["attention_mask"])
        model(inputs["input_ids"])
        assert taps[0].mask is None


def test_frozen_models_are_detached_and_students_keep_their_graph() -> None:
    model = build("bert")
    with tap_attention(model, [0]) as taps:
        model(**batch())
    assert taps[0].q.requires_grad
    with tap_attention(model, [0], detach=True) as taps:
        model(**batch())
    assert not taps[0].q.requires_grad
    model.requires_grad_(False)
    embedded = model.embeddings(batch()["input_ids"]).requires_grad_()
    with tap_attention(model, [0]) as taps:
        model(inputs_embeds=embedded)
    assert not taps[0].q.requires_grad
    assert not taps[0].k.requires_grad


def _gradients(model: Any, keep: list[Any]) -> dict[str, Tensor]:
    model.zero_grad()
    teacher = torch.Generator().manual_seed(3)
    with tap_attention(model, [1, 3]) as taps:
        output = model(**batch()).last_hidden_state
        recorded = list(taps.values())
        tq, tk = (torch.randn(B, 4, L, 8, generator=teacher) for _ in range(2))
        kl = attention_kl(
            [tq, tq],
            [tk, tk],
            [tap.q for tap in recorded],
            [tap.k for tap in recorded],
            recorded[0].mask,
            impl="torch",
        )
        (output.square().mean() + kl).backward()
        # Recomputation ran inside the context: it must not have replaced what the forward pass recorded.
        keep.extend(now is then for now, then in zip(taps.values(), recorded, strict=True))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    kept: list[Any] = []
    plain = _gradients(build(family).train(), kept)
    model = build(family).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = _gradients(model, kept)
    assert all(kept)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused() -> None:
    model = build("bert").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="reentrant"), tap_attention(model, [0]):
        pass


_UNTAPPABLE = {
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**_ENCODER)),
    "deberta-v2": lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**_ENCODER)),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=37, vocab_size=99)
    ),
    "gemma2": lambda: transformers.Gemma2Model(
        transformers.Gemma2Config(head_dim=16, attn_implementation="eager", **_DECODER)
    ),
}


@pytest.mark.parametrize("family", _UNTAPPABLE)
def test_families_that_cannot_be_tapped_are_named(family: str) -> None:
    model = _UNTAPPABLE[family]().eval()
    with pytest.raises(AttentionTapError, match=family) as caught, tap_attention(model, [0]):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert isinstance(caught.value, NotImplementedError)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="layer 4"), tap_attention(build("bert"), [4]):
        pass
