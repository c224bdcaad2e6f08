"""The sum of the losses, its parts, and who gets gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lead_ds.config import LossesConfig
from lead_ds.errors import InputError
from lead_ds.losses import Objective, Views, contrastive_loss, margin_mse
from lead_ds.relevance import Relevance, VectorFeatures

Q, N, P = 3, 4, 12


class Scene:
    """Vectors of a teacher and a student with two layer pairs, and the views of them."""

    def __init__(self, seed: int = 0, mask: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).requires_grad_()

        self.student = [make(1, Q, 8), make(1, P, 8), make(2, Q, 8), make(2, P, 8)]
        self.teacher = [make(1, Q, 6), make(1, P, 6), make(2, Q, 6), make(2, P, 6)]
        s, t = self.student, self.teacher
        target = torch.arange(Q) * N
        self.views = Views(
            contrastive=VectorFeatures(s[0], s[1]).relevance(mask),
            contrastive_target=target,
            teacher_contrastive=VectorFeatures(t[0], t[1]).relevance(mask),
            student=VectorFeatures(s[0], s[1]).relevance(mask),
            teacher=VectorFeatures(t[0], t[1]).relevance(mask),
            target=target,
            student_layers=VectorFeatures(s[2], s[3]).relevance(mask),
            teacher_layers=VectorFeatures(t[2], t[3]).relevance(mask),
            group=N,
        )


def losses(**weights: float) -> LossesConfig:
    names = ("contrastive", "response", "margin_mse", "layer")
    return LossesConfig.model_validate({name: {"weight": weights.get(name, 0.0)} for name in names})


def test_loss_is_the_weighted_sum_of_parts() -> None:
    output = Objective(losses(contrastive=0.5, response=2.0, margin_mse=0.1, layer=3.0))(Scene().views)
    parts = output.parts
    assert set(parts) == {"contrastive", "response", "margin_mse", "layer"}
    expected = 0.5 * parts["contrastive"] + 2 * parts["response"] + 0.1 * parts["margin_mse"] + 3 * parts["layer"]
    torch.testing.assert_close(output.loss.detach(), expected)
    assert output.layer_kl is not None
    assert output.layer_weights is not None
    torch.testing.assert_close(parts["layer"], (output.layer_kl * output.layer_weights).sum())
    for vector in (output.layer_nll, output.teacher_entropy, output.student_entropy):
        assert vector is not None
        assert vector.shape == (2,)
        assert not vector.requires_grad


@pytest.mark.parametrize("reweight", [True, False])
def test_one_weight_multiplies_the_layer_loss_with_and_without_reweighting(reweight: bool) -> None:
    values = []
    for weight in (1.0, 0.25):
        config = LossesConfig.model_validate(
            {"contrastive": {"weight": 0}, "response": {"weight": 0}, "layer": {"weight": weight, "reweight": reweight}}
        )
        values.append(Objective(config)(Scene().views).loss.item())
    assert values[1] == pytest.approx(0.25 * values[0])


def test_a_frozen_teacher_gets_no_gradient() -> None:
    scene = Scene()
    output = Objective(losses(contrastive=1, response=1, margin_mse=1, layer=1))(scene.views)
    output.loss.backward()
    assert all(leaf.grad is None for leaf in scene.teacher)
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in scene.student)
    assert "teacher_contrastive" not in output.parts


def test_a_cotrained_teacher_gets_gradient_from_every_loss() -> None:
    for name in ("contrastive", "response", "layer"):
        scene = Scene()
        output = Objective(losses(**{name: 1.0}), cotrain=True)(scene.views)
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
    scene.views.teacher_contrastive = Relevance(scores)
    scene.views.target = torch.zeros(Q, dtype=torch.long)
    output = Objective(losses(contrastive=1), cotrain=True)(scene.views)
    expected = -scores[0].log_softmax(-1)[:, 0].mean()
    torch.testing.assert_close(output.parts["teacher_contrastive"], expected)


def test_a_cotrained_teacher_has_a_temperature_of_its_own() -> None:
    scene = Scene()
    settings = losses(contrastive=1)
    alike = Objective(settings, cotrain=True)(scene.views).parts
    settings = settings.model_copy(
        update={"contrastive": settings.contrastive.model_copy(update={"teacher_temperature": 3.0})}
    )
    parts = Objective(settings, cotrain=True)(scene.views).parts
    teacher = scene.views.teacher_contrastive
    assert teacher is not None
    expected = contrastive_loss(teacher, scene.views.contrastive_target, 3.0)
    torch.testing.assert_close(parts["teacher_contrastive"], expected)
    torch.testing.assert_close(parts["contrastive"], alike["contrastive"])
    assert parts["teacher_contrastive"] != alike["teacher_contrastive"]


def test_contrastive_by_hand_with_temperature() -> None:
    config = LossesConfig.model_validate(
        {"contrastive": {"temperature": 0.5}, "response": {"weight": 0}, "layer": {"weight": 0}}
    )
    logits = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    output = Objective(config)(Views(Relevance(logits), torch.tensor([0, 1])))
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
    mask = torch.ones(Q, P, dtype=torch.bool)
    mask[0, 5:] = False
    for cotrain in (False, True):
        scene = Scene(mask=mask)
        output = Objective(losses(contrastive=1, response=1, layer=1), cotrain=cotrain)(scene.views)
        output.loss.backward()
        assert output.loss.isfinite()
        for leaf in scene.student + (scene.teacher if cotrain else []):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()


def test_queries_split_over_processes_average_to_the_whole() -> None:
    """The mean of halves' losses and gradients, weighing by their mean NLL, is the whole batch's."""
    whole, config = Scene(), losses(contrastive=1, response=1, layer=1)
    output = Objective(config)(whole.views)
    output.loss.backward()
    assert output.layer_nll is not None
    shared = output.layer_nll
    halves = Scene()
    total = torch.zeros(())
    for i in range(Q):
        views = Scene().views
        rows = slice(i, i + 1)
        for name in ("contrastive", "student", "teacher", "student_layers", "teacher_layers"):
            side = halves.teacher if name.startswith("teacher") else halves.student
            q, p = side[2:] if name.endswith("layers") else side[:2]
            setattr(views, name, VectorFeatures(q[:, rows], p).relevance())
        views.contrastive_target, views.target = whole.views.contrastive_target[rows], whole.views.target[rows]
        total = total + Objective(config, mean=lambda _: shared)(views).loss / Q
    total.backward()
    torch.testing.assert_close(total, output.loss)
    for part, leaf in zip(halves.student, whole.student, strict=True):
        torch.testing.assert_close(part.grad, leaf.grad)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(InputError, match="losses: every weight is 0"):
        Objective(losses())


def test_a_missing_view_is_named() -> None:
    scene = Scene()
    scene.views.teacher = None
    with pytest.raises(ValueError, match=r"Views\.teacher"):
        Objective(losses(response=1))(scene.views)
