"""Matryoshka: every loss that reads the student's vectors is its mean over widths, whatever else it compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from lead_ds.config import losses_section
from lead_ds.errors import InputError
from lead_ds.losses import LossShape, ModelFacts, Objective, Scope, Side, Views
from lead_ds.losses.quantised import rounded
from lead_ds.relevance import VectorFeatures

Q, N, D, T = 3, 2, 8, 6
DIMS = (2, 4, D)
LAYERS = ([0, 1], [0, 1])


def features(width: int, layers: int, seed: int) -> VectorFeatures:
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(layers, texts, width, generator=generator) for texts in (Q, Q * N))
    return VectorFeatures(q, p)


def cut(x: VectorFeatures, dim: int) -> VectorFeatures:
    return VectorFeatures(normalize(x.q_KQD[..., :dim], dim=-1), normalize(x.p_KPD[..., :dim], dim=-1))


def distance(student: VectorFeatures, teacher: VectorFeatures, map_TD: torch.Tensor) -> torch.Tensor:
    """1 - cosine, the mean of queries, positives and negatives."""
    q, p = (
        1 - torch.cosine_similarity(s[-1] @ map_TD.T, t[-1], dim=-1)
        for s, t in ((student.q_KQD, teacher.q_KQD), (student.p_KPD, teacher.p_KPD))
    )
    return (q.mean() + p[0::2].mean() + p[1::2].mean()) / 3


@pytest.mark.parametrize(
    "name", ["contrastive", "response", "layer", "margin_mse", "embedding", "similarity", "spread"]
)
def test_each_loss_is_its_mean_over_widths(name: str) -> None:
    weights = {"contrastive": {"weight": 0}, "response": {"weight": 0}, "layer": {"weight": 0}} | {name: {"weight": 1}}
    section = losses_section().model_validate(weights)
    facts = ModelFacts("dual_encoder", layers=2, width=D, unit=True), ModelFacts("dual_encoder", layers=2, width=T)
    student, teacher = cut(features(D, 3, 1), D), features(T, 3, 2)

    def views(dim: int) -> Views:
        sides = [Side(x.at([2]), x.at([0, 1])) for x in (cut(student, dim), teacher)]
        return Views(sides[0], sides[1], Scope(N))

    whole = Objective(section, LossShape(*facts, "torch", DIMS))
    plain = Objective(section, LossShape(*facts, "torch"))
    plain.load_state_dict(whole.state_dict())
    asked = whole.asked([{name: LAYERS} if name == "layer" else {}])
    found = whole([views(D)], asked)
    if name == "embedding":  # of a narrower student the map's first columns
        expected = torch.stack([distance(cut(student, dim), teacher, whole["embedding"].map[:, :dim]) for dim in DIMS])
    else:
        expected = torch.stack([plain([views(dim)], asked).loss for dim in DIMS])
    torch.testing.assert_close(found.loss, expected.mean())
    torch.testing.assert_close(found.parts[name], expected.mean().detach())
    torch.testing.assert_close(found.parts[f"{name}@2"], expected[0].detach())


@pytest.mark.parametrize("how", ["int8", "binary"])
def test_quantised_training_sees_what_bits_hold_and_passes_the_gradient(how: Any) -> None:
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    held = rounded(x, how)
    levels = {len(row.unique()) for row in held.detach()}
    assert levels <= ({2} if how == "binary" else set(range(2, D + 1)))
    assert torch.cosine_similarity(held, x, dim=-1).min() > (0.6 if how == "binary" else 0.9999)
    [gradient] = torch.autograd.grad((held * torch.arange(D)).sum(), x)
    torch.testing.assert_close(gradient, torch.arange(D).float().expand(5, D))
    weights = {
        "contrastive": {"weight": 0},
        "response": {"weight": 0},
        "layer": {"weight": 0},
        "similarity": {"weight": 1},
    }
    section, facts = losses_section().model_validate(weights), ModelFacts("dual_encoder", layers=2, width=D, unit=True)
    views = Views(Side(cut(features(D, 1, 1), D)), Side(features(T, 1, 2)), Scope(N))
    objective = Objective(section, LossShape(facts, facts, "torch", (4, D), how))
    found = objective([views], objective.asked([{}]))
    assert found.parts.keys() == {"similarity", "similarity@4", f"similarity@4@{how}", f"similarity@{how}"}
    assert (found.parts[f"similarity@{how}"] != found.parts["similarity@4"]).item()


@pytest.mark.parametrize(("dims", "says"), [((4, 16), "16 requested, its vectors have 8"), ((2, 4), "add 8")])
def test_widths_are_those_of_its_vectors(dims: tuple[int, ...], says: str) -> None:
    section = losses_section().model_validate({"response": {"weight": 0}, "layer": {"weight": 0}})
    with pytest.raises(InputError, match=says):
        Objective(section, LossShape(ModelFacts("dual_encoder", layers=2, width=D), dims=dims))
