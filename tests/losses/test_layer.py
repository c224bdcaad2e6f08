"""Layer relevance KL: values by hand, gradients, masks, invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lead_ds.kernels import deviations
from lead_ds.kernels.layer_kl import chunked, inputs
from lead_ds.losses import entropy, layer_relevance_kl, relevance_kl, response_kl
from lead_ds.relevance import Relevance, VectorFeatures


def vectors(k: int, q: int, p: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, q, d, generator=generator), torch.randn(k, p, d, generator=generator)


def test_by_hand() -> None:
    # Teacher halves (1/2, 1/2), student (3/4, 1/4): KL = ln(2/3)/2 + ln(2)/2; teacher NLL = ln 2.
    teacher = torch.zeros(1, 1, 2)
    student = torch.tensor([[[math.log(3.0), 0.0]]])
    out = layer_relevance_kl(teacher, student, torch.tensor([0]))
    assert out.loss.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    assert out.nll.tolist() == pytest.approx([math.log(2)])
    assert out.weights.tolist() == [1.0]


def test_weights_prefer_the_layer_that_knows_the_positive() -> None:
    teacher = torch.zeros(2, 1, 3)
    teacher[1, 0, 2] = 4.0
    out = layer_relevance_kl(teacher, torch.zeros(2, 1, 3), torch.tensor([2]), layer_temperature=0.5)
    nll = [math.log(3), math.log(2 + math.exp(4)) - 4]
    expected = torch.tensor([-nll[0] / 0.5, -nll[1] / 0.5]).softmax(0)
    torch.testing.assert_close(out.weights, expected)
    torch.testing.assert_close(out.loss, (expected * out.per_layer).sum())


def test_without_reweighting_it_is_a_plain_sum() -> None:
    teacher, student = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    out = layer_relevance_kl(teacher, student, torch.arange(4), reweight=False)
    assert out.weights.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(out.loss, out.per_layer.sum())


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5)])
def test_gradcheck(reweight: bool, temperatures: tuple[float, float]) -> None:
    torch.manual_seed(0)
    teacher, student = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # Weights carry no gradient by definition, so the teacher's is checked where they are constant.
    teacher = teacher if not reweight else teacher.detach()
    target = torch.tensor([0, 2, 4])

    def loss(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return layer_relevance_kl(t, s, target, *temperatures, reweight=reweight).loss

    assert loss(teacher, student).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (teacher, student))


def test_weights_carry_no_gradient_to_the_teacher() -> None:
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    student = torch.randn(2, 3, 5)
    out = layer_relevance_kl(teacher, student, torch.zeros(3, dtype=torch.long), layer_temperature=0.1)
    out.loss.backward()
    fixed = teacher.detach().requires_grad_()
    kl, _ = relevance_kl(fixed, student, torch.zeros(3, dtype=torch.long))
    (out.weights * kl).sum().backward()
    torch.testing.assert_close(teacher.grad, fixed.grad, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_factors_and_logits_agree(masked: bool) -> None:
    mask = None
    if masked:
        mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) > 0.3
        mask[torch.arange(5), torch.arange(5)] = True
    target = torch.arange(5)
    (tq, tp), (sq, sp) = vectors(3, 5, 9, 16), vectors(3, 5, 9, 7, seed=1)
    results = []
    for as_factors in (True, False):
        leaves = sq.clone().requires_grad_(), sp.clone().requires_grad_()
        if as_factors:
            teacher = Relevance(factors=(tq, tp), mask_QP=mask)
            student = Relevance(factors=leaves, mask_QP=mask)
        else:
            teacher = Relevance(tq @ tp.mT, mask_QP=mask)
            student = Relevance(leaves[0] @ leaves[1].mT, mask_QP=mask)
        out = layer_relevance_kl(teacher, student, target, 2.0, 0.7, layer_temperature=1.0)
        out.loss.backward()
        results.append((out.loss.detach(), out.per_layer, out.nll, leaves[0].grad, leaves[1].grad))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_factors", [True, False])
def test_masked_columns_change_nothing(as_factors: bool) -> None:
    """Passages that are masked out, whatever they hold, leave loss and gradients as if they were not there."""
    (tq, tp), (sq, sp) = vectors(2, 4, 6, 8), vectors(2, 4, 6, 8, seed=1)
    junk = 1e3 * torch.randn(2, 3, 8)
    target = torch.tensor([0, 2, 4, 5])
    plain_mask = torch.ones(4, 6, dtype=torch.bool)
    results = []
    for padded in (False, True):
        leaf = sq.clone().requires_grad_()
        t, s = ((torch.cat([p, junk], 1) if padded else p) for p in (tp, sp))
        mask = torch.cat([plain_mask, torch.zeros(4, 3, dtype=torch.bool)], 1) if padded else plain_mask
        if as_factors:
            pair = Relevance(factors=(tq, t), mask_QP=mask), Relevance(factors=(leaf, s), mask_QP=mask)
        else:
            pair = Relevance(tq @ t.mT, mask_QP=mask), Relevance(leaf @ s.mT, mask_QP=mask)
        out = layer_relevance_kl(*pair, target, 0.05, 0.05)
        out.loss.backward()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        results.append((out.loss.detach(), out.nll, out.weights, leaf.grad, entropy(pair[0]), entropy(pair[1])))
    for plain, padded_result in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded_result, rtol=1e-5, atol=1e-6)


def test_a_cotrained_teacher_gets_finite_gradient_through_masks() -> None:
    teacher, student = (torch.randn(2, 3, 6, requires_grad=True) for _ in range(2))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 3:] = False
    pair = Relevance(teacher, mask_QP=mask), Relevance(student, mask_QP=mask)
    target = torch.zeros(3, dtype=torch.long)
    loss = layer_relevance_kl(*pair, target, 0.01, 3.0).loss + response_kl(
        Relevance(teacher[:1], mask_QP=mask), Relevance(student[:1], mask_QP=mask), target, reverse=True
    )
    loss.backward()
    for leaf in (teacher, student):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad[:, 0, 3:].abs().max() == 0


def test_a_column_masked_for_one_model_leaves_both_distributions() -> None:
    teacher, student = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 4] = False
    target = torch.zeros(2, dtype=torch.long)
    one_side, _ = relevance_kl(Relevance(teacher, mask_QP=mask), Relevance(student), target)
    cut, _ = relevance_kl(Relevance(teacher[..., :4]), Relevance(student[..., :4]), target)
    torch.testing.assert_close(one_side, cut)


@pytest.mark.parametrize("as_factors", [True, False])
def test_identical_teacher_and_student_give_zero(as_factors: bool) -> None:
    q, p = vectors(2, 3, 7, 5)
    leaf = q.clone().requires_grad_()
    features, own = VectorFeatures(q, p).relevance(), VectorFeatures(leaf, p).relevance()
    if not as_factors:
        features, own = Relevance(features.logits), Relevance(own.logits)
    out = layer_relevance_kl(features, own, torch.arange(3))
    out.loss.backward()
    assert leaf.grad is not None
    # Not bit-equal across the two factor products, hence a bound of rounding instead of 0.
    assert abs(out.loss.item()) < 1e-6
    assert leaf.grad.abs().max() < 1e-6


def test_adding_a_constant_to_a_query_changes_nothing() -> None:
    torch.manual_seed(0)
    teacher, student, target = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.arange(3)
    plain = layer_relevance_kl(teacher, student, target)
    moved = layer_relevance_kl(teacher + 1000.0, student - 1000.0, target)
    torch.testing.assert_close(plain.loss, moved.loss, rtol=1e-3, atol=1e-4)  # 1000 costs 10 bits of float32


def test_processes_agree_on_weights_through_mean() -> None:
    teacher, student, target = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.zeros(2, dtype=torch.long)
    shared = torch.tensor([0.1, 0.2, 3.0])
    out = layer_relevance_kl(teacher, student, target, layer_temperature=1.0, mean=lambda _: shared)
    torch.testing.assert_close(out.weights, (-shared).softmax(0))


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 4\].*\[1, 3, 4\]"):
        layer_relevance_kl(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), torch.zeros(3, dtype=torch.long))


def test_entropy_shows_a_saturated_layer() -> None:
    logits = torch.zeros(2, 100, 4)
    logits[1, :, 0] = 1000.0
    assert entropy(Relevance(logits)).tolist() == pytest.approx([math.log(4), 0.0])
    q, p = vectors(2, 100, 6, 3)
    torch.testing.assert_close(entropy(Relevance(factors=(q, p))), entropy(Relevance(q @ p.mT)), rtol=1e-5, atol=1e-6)


class Sizes(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made inside."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_z_scores_need_no_map(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each query's deviation alone: the values and gradients of the map, of which only blocks are made."""
    layers, queries, passages = 3, 12, 40
    mask = torch.rand(queries, passages) > 0.3 if masked else None
    target = torch.arange(queries)
    if mask is not None:
        mask[target, target] = True
    teacher = VectorFeatures(*vectors(layers, queries, passages, 8), scale="standard").relevance(mask)
    q, p = (x.requires_grad_() for x in vectors(layers, queries, passages, 6, seed=1))

    def evaluate(student: Relevance) -> tuple[torch.Tensor, ...]:
        kl, nll = relevance_kl(teacher, student, target, 2.0, 0.5)
        assert not nll.requires_grad
        return kl, nll, *torch.autograd.grad(kl, (q, p), torch.arange(1.0, 4.0))

    def student() -> Relevance:
        return VectorFeatures(q, p + 1, scale="standard").relevance(mask)

    by_map = evaluate(student())
    monkeypatch.setattr(inputs, "_STORED_SCORES", 0)
    for module, name in ((deviations, "_BLOCK_SCORES"), (chunked, "_CHUNK_SCORES")):
        monkeypatch.setattr(module, name, 2 * passages)
    monkeypatch.setattr(chunked, "_CHUNK_ROWS", 2)
    monkeypatch.setattr(inputs, "_RESIDUAL_SHARE", 0)
    with Sizes() as sizes:
        by_sums = evaluate(student())
    assert sizes.largest <= max(x.numel() for x in (*teacher.factors, q, p))  # type: ignore[misc]
    assert sizes.largest < layers * queries * passages
    for found, exact in zip(by_sums, by_map, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
