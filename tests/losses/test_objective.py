"""The sum of the losses, its parts, and who gets gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lead_ds.config import losses_section
from lead_ds.errors import InputError
from lead_ds.losses import (
    Losses,
    LossShape,
    ModelFacts,
    Objective,
    ObjectiveOutput,
    Scope,
    Side,
    Views,
    contrastive_loss,
    margin_mse,
)
from lead_ds.relevance import Relevance, ScoreFeatures, VectorFeatures

Q, N, P = 3, 4, 12


LAYERS = ([3, 5], [0, 1])


class Scene:
    """Vectors of a teacher and a student with two layer pairs, and the views of them."""

    def __init__(self, seed: int = 0, keys: tuple[Tensor, Tensor] | None = None, cotrained: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).requires_grad_()

        self.student = [make(1, Q, 8), make(1, P, 8), make(2, Q, 8), make(2, P, 8)]
        self.teacher = [make(1, Q, 6), make(1, P, 6), make(2, Q, 6), make(2, P, 6)]
        student, teacher = (
            Side(VectorFeatures(*side[:2]), VectorFeatures(*side[2:])) for side in (self.student, self.teacher)
        )
        self.views = Views(student, teacher, Scope(N), keys, cotrained=cotrained)


def losses(**weights: float) -> Losses:
    names = ("contrastive", "response", "margin_mse", "layer")
    return losses_section().model_validate({name: {"weight": weights.get(name, 0.0)} for name in names})


def objective(settings: Losses, views: Views) -> ObjectiveOutput:
    facts = ModelFacts("dual_encoder", layers=12)
    made = Objective(settings, LossShape(facts, facts))
    return made([views], made.asked([{"layer": LAYERS}]))


def test_loss_is_the_weighted_sum_of_parts() -> None:
    output = objective(losses(contrastive=0.5, response=2.0, margin_mse=0.1, layer=3.0), Scene().views)
    parts = output.parts
    assert set(parts) == {"contrastive", "response", "margin_mse", "layer"}
    expected = 0.5 * parts["contrastive"] + 2 * parts["response"] + 0.1 * parts["margin_mse"] + 3 * parts["layer"]
    torch.testing.assert_close(output.loss.detach(), expected)
    layers = output.layers["layers"]
    torch.testing.assert_close(parts["layer"], (layers["kl"] * layers["weights"]).sum())
    assert layers.keys() == {"kl", "weights", "nll", "teacher_entropy", "student_entropy"}
    for vector in layers.values():
        assert vector.shape == (2,)
        assert not vector.requires_grad


@pytest.mark.parametrize("reweight", [True, False])
def test_one_weight_multiplies_the_layer_loss_with_and_without_reweighting(reweight: bool) -> None:
    values = []
    for weight in (1.0, 0.25):
        config = losses_section().model_validate(
            {"contrastive": {"weight": 0}, "response": {"weight": 0}, "layer": {"weight": weight, "reweight": reweight}}
        )
        values.append(objective(config, Scene().views).loss.item())
    assert values[1] == pytest.approx(0.25 * values[0])


def test_a_frozen_teacher_gets_no_gradient() -> None:
    scene = Scene()
    output = objective(losses(contrastive=1, response=1, margin_mse=1, layer=1), scene.views)
    output.loss.backward()
    assert all(leaf.grad is None for leaf in scene.teacher)
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in scene.student)
    assert "teacher_contrastive" not in output.parts


def test_a_cotrained_teacher_gets_gradient_from_every_loss() -> None:
    for name in ("contrastive", "response", "layer"):
        scene = Scene(cotrained=True)
        output = objective(losses(**{name: 1.0}), scene.views)
        output.loss.backward()
        grads = [leaf.grad for leaf in (scene.teacher[2:] if name == "layer" else scene.teacher[:2])]
        assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
        assert (
            set(output.parts)
            == {
                "contrastive": {"contrastive", "teacher_contrastive"},
                "response": {"response", "response_reverse"},
                "layer": {"layer"},
            }[name]
        )


def test_a_cotrained_teacher_of_pairs_is_judged_in_its_group() -> None:
    scene = Scene()
    scores = torch.randn(1, Q, N)
    views = Views(scene.views.student, Side(ScoreFeatures(scores)), Scope(N), cotrained=True)
    output = objective(losses(contrastive=1), views)
    expected = -scores[0].log_softmax(-1)[:, 0].mean()
    torch.testing.assert_close(output.parts["teacher_contrastive"], expected)


def test_a_cotrained_teacher_has_a_temperature_of_its_own() -> None:
    scene = Scene(cotrained=True)
    settings = losses(contrastive=1)
    alike = objective(settings, scene.views).parts
    settings = settings.model_copy(
        update={"contrastive": settings.contrastive.model_copy(update={"teacher_temperature": 3.0})}
    )
    parts = objective(settings, scene.views).parts
    expected = contrastive_loss(scene.views.relevance("teacher"), scene.views.target(), 3.0)
    torch.testing.assert_close(parts["teacher_contrastive"], expected)
    torch.testing.assert_close(parts["contrastive"], alike["contrastive"])
    assert parts["teacher_contrastive"] != alike["teacher_contrastive"]


def test_contrastive_by_hand_with_temperature() -> None:
    config = losses_section().model_validate(
        {"contrastive": {"temperature": 0.5}, "response": {"weight": 0}, "layer": {"weight": 0}}
    )
    student = VectorFeatures(torch.eye(2)[None], torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]))
    output = objective(config, Views(Side(student), None, Scope(1)))
    expected = (torch.tensor([2.0, 6.0]).neg().exp() + 1).log().mean()
    torch.testing.assert_close(output.loss, expected)


def test_margin_mse_reads_the_querys_own_negatives() -> None:
    student = torch.tensor([[[3.0, 1.0, 50.0, 60.0], [70.0, 80.0, 2.0, 0.5]]])
    teacher = torch.tensor([[[5.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    value = margin_mse(Relevance(teacher), Relevance(student), torch.tensor([0, 2]), 2, teacher_scale=0.5)
    assert value.item() == pytest.approx((((5 - 1) * 0.5 - 2) ** 2 + (1 * 0.5 - 1.5) ** 2) / 2)


def test_margin_mse_leaves_masked_negatives_out() -> None:
    student = torch.tensor([[[3.0, 1.0, -7.0]]], requires_grad=True)
    teacher = torch.tensor([[[5.0, 1.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    value = margin_mse(Relevance(teacher, mask_QP=mask), Relevance(student, mask_QP=mask), torch.tensor([0]), 3)
    value.backward()
    assert value.item() == pytest.approx((4 - 2) ** 2)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0, 0, 2] == 0


def test_masked_batch_gives_finite_loss_and_gradients() -> None:
    # Every passage behind the fifth is a positive of the first query, too.
    keys = torch.arange(P), torch.stack([torch.arange(5, P), *[torch.full((P - 5,), i * N) for i in range(1, Q)]])
    for cotrain in (False, True):
        scene = Scene(keys=keys, cotrained=cotrain)
        assert scene.views.mask is not None
        assert scene.views.mask.sum() == P * Q - (P - 5)
        output = objective(losses(contrastive=1, response=1, layer=1), scene.views)
        output.loss.backward()
        assert output.loss.isfinite()
        for leaf in scene.student + (scene.teacher if cotrain else []):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


@dataclass(frozen=True)
class ScopeOfOne(Scope):
    """Query `row` alone, of a batch whose passages are all in scope and whose layers have the mean NLL `shared`."""

    row: int = 0
    shared: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        return self.shared

    def target(self, queries: int, device: torch.device) -> Tensor:
        return super().target(queries, device) + self.row * self.group_size


def test_queries_split_over_processes_average_to_the_whole() -> None:
    """The mean of parts' losses and gradients, weighing by their mean NLL, is the whole batch's."""
    whole, config = Scene(), losses(contrastive=1, response=1, layer=1)
    output = objective(config, whole.views)
    output.loss.backward()
    parts, total = Scene(), torch.zeros(())
    for i in range(Q):
        student, teacher = (
            Side(*(VectorFeatures(q[:, i : i + 1], p) for q, p in (side[:2], side[2:])))
            for side in (parts.student, parts.teacher)
        )
        views = Views(student, teacher, ScopeOfOne(N, row=i, shared=output.layers["layers"]["nll"]))
        total = total + objective(config, views).loss / Q
    total.backward()
    torch.testing.assert_close(total, output.loss)
    for part, leaf in zip(parts.student, whole.student, strict=True):
        torch.testing.assert_close(part.grad, leaf.grad)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(InputError, match="losses: every weight is 0"):
        objective(losses(), Scene().views)


def test_a_missing_view_is_named() -> None:
    views = Views(Scene().views.student, None, Scope(N))
    with pytest.raises(ValueError, match=r"Views\.teacher"):
        objective(losses(response=1), views)
