"""Several teachers in one objective: shares, a mixture by likelihood, a concatenation of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lead_ds.config import losses_section
from lead_ds.losses import LossShape, ModelFacts, Scope, Side, Views
from lead_ds.losses.mixture import concatenated, mixture
from lead_ds.losses.objective import Objective, ObjectiveOutput, Taught
from lead_ds.relevance import Relevance, ScoreFeatures, VectorFeatures

Q, N = 3, 4
NAMES = ("contrastive", "response", "layer", "margin_mse", "embedding")


def losses(**weights: float) -> Any:
    return losses_section().model_validate({name: {"weight": weights.get(name, 0.0)} for name in NAMES})


def vectors(width: int, seed: int) -> VectorFeatures:
    made = torch.Generator().manual_seed(seed)
    return VectorFeatures(torch.randn(1, Q, width, generator=made), torch.randn(1, Q * N, width, generator=made))


def run(
    settings: Any, teachers: Sequence[Any], weights: Sequence[float], **mix: str
) -> tuple[ObjectiveOutput, Tensor, Objective]:
    """The objective of a student of width 5 with some teachers, and the gradient of its passages' vectors."""
    student = vectors(5, seed=0)
    leaf = student.p_KPD.requires_grad_()
    feeds = frozenset(NAMES)
    taught = [
        Taught(ModelFacts("dual_encoder", 3, one.width), feeds, weight)
        for one, weight in zip(teachers, weights, strict=True)
    ]
    torch.manual_seed(0)
    made = Objective(settings, LossShape(ModelFacts("dual_encoder", 3, 5)), taught, **mix)
    first = Views(Side(student), Side(teachers[0]), Scope(N))
    said = made([first, *(first.beside(Side(other)) for other in teachers[1:])], made.asked([{} for _ in taught]))
    said.loss.backward()
    assert leaf.grad is not None
    return said, leaf.grad, made


@pytest.mark.parametrize("name", ["response", "margin_mse"])
def test_shares_have_the_gradient_of_the_mean_of_relevance(name: str) -> None:
    one, other = vectors(6, seed=1), vectors(7, seed=2)
    said, gradient, made = run(losses(**{name: 2.0}), [one, other], [3.0, 1.0])
    assert set(made) == {f"{name}:0", f"{name}:1"}
    parts = said.parts
    assert torch.allclose(parts[name], 0.75 * parts[f"{name}:0"] + 0.25 * parts[f"{name}:1"])
    assert torch.allclose(said.loss, 2 * parts[name])
    told = [x.group_relevance(N).logits if name == "margin_mse" else x.relevance().logits for x in (one, other)]
    if name == "margin_mse":  # of a query's own passages: their mean is that of a model of scores
        mean = ScoreFeatures(0.75 * told[0] + 0.25 * told[1])
        _, expected, _ = run(losses(**{name: 2.0}), [mean], [1.0])
        assert torch.allclose(gradient, expected, atol=1e-6)
    else:
        student = vectors(5, seed=0)
        leaf = student.p_KPD.requires_grad_()
        mean_QP = 0.75 * told[0].softmax(-1) + 0.25 * told[1].softmax(-1)
        (-2 * (mean_QP * student.relevance().logits.log_softmax(-1)).sum(-1).mean()).backward()
        assert leaf.grad is not None
        assert torch.allclose(gradient, leaf.grad, atol=1e-6)


def test_a_mixture_counts_a_teacher_by_its_likelihood_of_the_positive() -> None:
    logits = [torch.randn(1, Q, N, dtype=torch.float64) for _ in range(2)]
    masked = torch.ones(Q, N, dtype=torch.bool)
    masked[0, 3] = False
    target_Q = torch.tensor([0, 1, 2])
    mixed = mixture([Relevance(logits[0]), Relevance(logits[1], mask_QP=masked)], [0.8, 0.2], target_Q)
    first, second = logits[0][0].softmax(-1), logits[1][0].masked_fill(~masked, -1e30).softmax(-1)
    found = torch.stack([0.8 * first[range(Q), target_Q], 0.2 * second[range(Q), target_Q]])
    weight = found / found.sum(0)
    expected = weight[0, :, None] * first + weight[1, :, None] * second
    assert torch.allclose(mixed.logits[0].exp()[masked].double(), expected[masked], atol=1e-6)
    assert mixed.mask is not None
    assert not mixed.mask[0, 3]


def test_a_mixture_with_scores_is_over_a_querys_own_passages() -> None:
    scores = ScoreFeatures(torch.randn(1, Q, N))
    said, gradient, made = run(losses(response=1.0), [vectors(6, seed=1), scores], [1.0, 1.0], relevance="nll")
    assert set(made) == {"response"} == set(said.parts)
    assert torch.isfinite(gradient).all()
    same, expected, _ = run(losses(response=1.0), [scores, scores], [5.0, 1.0], relevance="nll")
    alone, of_one, _ = run(losses(response=1.0), [scores], [1.0])
    assert torch.allclose(expected, of_one, atol=1e-6)
    assert torch.allclose(same.loss, alone.loss, atol=1e-6)


def test_vectors_are_folded_or_concatenated() -> None:
    one, other = vectors(6, seed=1), vectors(7, seed=2)
    _, _, folded = run(losses(embedding=1.0), [one, other], [1.0, 1.0])
    assert {name: tuple(x.shape) for name, x in folded.named_parameters()} == {
        "embedding:0.map": (6, 5),
        "embedding:1.map": (7, 5),
    }
    said, _, joined = run(losses(embedding=1.0), [one, other], [3.0, 1.0], vectors="concatenate")
    assert [tuple(x.shape) for x in joined.parameters()] == [(13, 5)]
    assert set(said.parts) == {"embedding"}
    both = concatenated([one, other], [0.75, 0.25])
    told = [torch.nn.functional.cosine_similarity(x.q_KQD[0], x.p_KPD[0, ::N]) for x in (one, other, both)]
    assert torch.allclose(0.75 * told[0] + 0.25 * told[1], told[2], atol=1e-6)
