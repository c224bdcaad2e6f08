"""grouped_attention_kl: maps of two tokenizers compared over groups of tokens."""

import pytest
import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.op import attention_kl
from lead_ds.kernels.grouped import op as grouped
from lead_ds.kernels.grouped.op import grouped_attention_kl
from tests.kernels.references import grouped_attention_kl_reference

# Text 0: a token of one model is two of the other, both ways; text 1: groups that only one model has; text 2: none at all.
T_GROUPS = torch.tensor([[-1, 0, 0, 1, 2, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5, 6, 7, -1], [-1] * 9])
S_GROUPS = torch.tensor([[0, 1, 1, 2, 3, -1], [-1, 0, 0, 2, 3, 3], [0, 1, 2, 3, 4, 5]])


def tensors(dtype: torch.dtype = torch.float64, t_keys: int = 4, s_keys: int = 4) -> list[Tensor]:
    shapes = ((3, 4, 9, 8), (3, t_keys, 9, 8), (3, 4, 6, 12), (3, s_keys, 6, 12))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def evaluate(function: object, inputs: list[Tensor], **arguments: object) -> list[Tensor]:
    tq, tk, sq, sk = inputs
    sq, sk = sq.detach().requires_grad_(), sk.detach().requires_grad_()
    value = function(tq, tk, sq, sk, T_GROUPS, S_GROUPS, **arguments)  # type: ignore[operator]
    return [value.detach(), *torch.autograd.grad(value * 2, (sq, sk))]


@pytest.mark.parametrize("chunk", [1 << 18, 200])
@pytest.mark.parametrize(("t_keys", "s_keys"), [(4, 4), (2, 4), (2, 1)])
def test_matches_the_reference(chunk: int, t_keys: int, s_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_CPU_CHUNK", chunk)
    inputs = tensors(t_keys=t_keys, s_keys=s_keys)
    exact = evaluate(grouped_attention_kl_reference, inputs, temperature=0.7)
    for found, true in zip(evaluate(grouped_attention_kl, inputs, temperature=0.7), exact, strict=True):
        torch.testing.assert_close(found, true, atol=1e-13, rtol=1e-10)
    single = evaluate(grouped_attention_kl, [x.float() for x in inputs], temperature=0.7)
    for found, true in zip(single, exact, strict=True):
        torch.testing.assert_close(found.double(), true, atol=1e-6, rtol=1e-4)


def test_reference_gradient_is_that_of_its_value() -> None:
    tq, tk, sq, sk = tensors()
    assert torch.autograd.gradcheck(
        lambda q, k: grouped_attention_kl_reference(tq, tk, q, k, T_GROUPS, S_GROUPS),
        (sq.requires_grad_(), sk.requires_grad_()),
    )


@pytest.mark.parametrize("causal", [False, True])
def test_with_a_group_for_every_token_it_is_attention_kl(causal: bool) -> None:
    inputs = [torch.randn(2, 2, 7, 8, dtype=torch.float64) for _ in range(4)]
    groups = torch.arange(7).repeat(2, 1)
    groups[1, 5:] = -1
    plain = attention_kl(*inputs, groups >= 0, causal=causal)
    torch.testing.assert_close(grouped_attention_kl(*inputs, groups, groups, causal=causal), plain)
    mean = grouped_attention_kl(*[[x, x] for x in inputs], groups, groups, causal=causal)
    torch.testing.assert_close(mean, plain)


def test_splitting_a_key_moves_no_mass() -> None:
    """A teacher token split into two of half its attention each is the same group: the KL does not change."""
    tq, tk, sq, sk = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(4))
    groups = torch.arange(4)[None]
    before = grouped_attention_kl(tq, tk, sq, sk, groups, groups)
    # Token 2 twice, its logit lowered by log 2: a ninth coordinate that every query reads as 1.
    split = [0, 1, 2, 2, 3]
    shift = torch.zeros(1, 1, 5, 1, dtype=torch.float64)
    shift[:, :, 2:4] = -torch.log(torch.tensor(2.0, dtype=torch.float64))
    longer_q = torch.cat([tq[:, :, split] * 8**-0.5, torch.ones_like(shift)], dim=-1)
    longer_k = torch.cat([tk[:, :, split], shift], dim=-1)
    after = grouped_attention_kl(
        longer_q, longer_k, sq, sk, torch.tensor([split]), groups, teacher_scale=1.0, student_scale=8**-0.5
    )
    torch.testing.assert_close(after, before)


def test_identical_models_give_zero_and_ungrouped_tokens_do_not_matter() -> None:
    q, k = torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    poisoned = [x.masked_fill((T_GROUPS == -1)[:, None, :, None], float("nan")) for x in (q, k)]
    sq, sk = q.clone().requires_grad_(), k.clone().requires_grad_()
    value = grouped_attention_kl(*poisoned, sq, sk, T_GROUPS, T_GROUPS)
    value.backward()
    assert value == 0
    assert sq.grad is not None
    assert sq.grad.abs().max() < 1e-7
    nothing = torch.full_like(T_GROUPS, -1)
    assert grouped_attention_kl(q, k, q, k, nothing, T_GROUPS) == 0


def test_wrong_arguments_are_refused() -> None:
    tq, tk, sq, sk = tensors()
    with pytest.raises(ValueError, match="cannot run"):
        grouped_attention_kl(tq, tk, sq, sk, T_GROUPS, S_GROUPS, impl="triton")
    with pytest.raises(ValueError, match="student groups must be integers"):
        grouped_attention_kl(tq, tk, sq, sk, T_GROUPS, T_GROUPS)
    with pytest.raises(ValueError, match="relation_heads"):
        grouped_attention_kl(tq, tk, sq[:, :2], sk[:, :2], T_GROUPS, S_GROUPS)
    with pytest.raises(ValueError, match="detach"):
        grouped_attention_kl(tq.requires_grad_(), tk, sq, sk, T_GROUPS, S_GROUPS)


def test_relation_heads_and_no_grad() -> None:
    tq, tk, sq, sk = tensors()
    exact = grouped_attention_kl_reference(tq, tk, sq, sk, T_GROUPS, S_GROUPS, relation_heads=2)
    with torch.no_grad():
        found = grouped_attention_kl(tq, tk, sq.requires_grad_(), sk, T_GROUPS, S_GROUPS, relation_heads=2)
    torch.testing.assert_close(found, exact)
    assert not found.requires_grad
