"""Losses of vectors against their formulas in float64 NumPy: embedding, similarity, spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lead_ds.config import losses_section
from lead_ds.errors import InputError
from lead_ds.losses import LOSSES, LossShape, ModelFacts, Scope, Side, Views, embedding_distance, spread_out
from lead_ds.losses.vectors import Moments
from lead_ds.relevance import ScoreFeatures, TokenFeatures, VectorFeatures

Q, N = 3, 4
DOUBLE = torch.float64


def vectors(width: int, seed: int, dtype: torch.dtype = DOUBLE) -> VectorFeatures:
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(1, texts, width, generator=generator, dtype=DOUBLE).to(dtype) for texts in (Q, Q * N))
    return VectorFeatures(q.requires_grad_(), p.requires_grad_())


def views(student: Any, teacher: Any, **changes: Any) -> Views:
    return Views(Side(student), None if teacher is None else Side(teacher), Scope(N), **changes)


def made(name: str, widths: tuple[int | None, int | None] = (5, 7), **settings: Any) -> Any:
    facts = [ModelFacts("dual_encoder", layers=3, width=width) for width in widths]
    return LOSSES[name](LOSSES[name].set(weight=1, **settings), LossShape(*facts))


def arrays(features: VectorFeatures) -> dict[str, np.ndarray]:
    """Vectors by kind of text."""
    q, p = features.q_KQD[0].detach().double().numpy(), features.p_KPD[0].detach().double().numpy()
    positive = np.arange(len(p)) % N == 0
    return {"queries": q, "positives": p[positive], "negatives": p[~positive], "passages": p}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def distance(s: np.ndarray, t: np.ndarray, which: str) -> float:
    each = {
        "cosine": 1 - (unit(s) * unit(t)).sum(-1),
        "l2": np.linalg.norm(s - t, axis=-1),
        "mse": ((s - t) ** 2).mean(-1),
    }
    return float(each[which].mean())


@pytest.mark.parametrize("which", ["cosine", "l2", "mse"])
@pytest.mark.parametrize("of", [["queries"], ["negatives", "queries"], ["queries", "positives", "negatives"]])
@pytest.mark.parametrize(
    ("into", "widths"), [("teacher", (5, 7)), ("teacher", (7, 5)), ("truncate", (5, 7)), ("same", (5, 5))]
)
def test_embedding(which: str, of: list[str], into: str, widths: tuple[int, int]) -> None:
    student, teacher = vectors(widths[0], 1), vectors(widths[1], 2)
    loss = made("embedding", widths, distance=which, of=of, into=into)
    s, t = arrays(student), arrays(teacher)
    if into == "teacher":
        with torch.no_grad():
            loss.map.normal_(generator=torch.Generator().manual_seed(3))
        s = {kind: x @ loss.map.detach().double().numpy().T for kind, x in s.items()}
    if into == "truncate":
        t = {kind: unit(x[:, : widths[0]]) for kind, x in t.items()}
    expected = np.mean([distance(s[kind], t[kind], which) for kind in of])
    assert loss(views(student, teacher)).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("which", ["cosine", "l2", "mse"])
@pytest.mark.parametrize("into", ["teacher", "truncate"])
def test_gradients_of_embedding(which: str, into: str) -> None:
    loss = made("embedding", distance=which, into=into).double()
    teacher = vectors(7, 2)
    given = [*(x.detach().requires_grad_() for x in (vectors(5, 1).q_KQD, vectors(5, 1).p_KPD)), *loss.parameters()]
    assert torch.autograd.gradcheck(lambda q, p, *_: loss(views(VectorFeatures(q, p), teacher)), given)


def test_equal_vectors_have_no_distance_and_a_gradient_that_is_a_number() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    for which in ("cosine", "l2", "mse"):
        [gradient] = torch.autograd.grad(embedding_distance(x, x.detach(), which), x)
        assert gradient.isfinite().all()
        assert embedding_distance(x, x, which).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("widths", [(5, 5), (5, 7), (7, 5)])
def test_a_map_begins_as_one_that_keeps_angles(widths: tuple[int, int]) -> None:
    weight = made("embedding", widths).map.detach()
    student, teacher = widths
    assert weight.shape == (teacher, student)
    small = weight.T @ weight if teacher >= student else weight @ weight.T
    torch.testing.assert_close(small, torch.eye(min(widths)), atol=1e-5, rtol=0)
    assert torch.equal(weight, torch.eye(5)) == (widths == (5, 5))


def test_similarity() -> None:
    student, teacher = vectors(5, 1), vectors(7, 2)
    s, t = ({kind: unit(x) for kind, x in arrays(side).items()} for side in (student, teacher))
    sides = {
        "query_query": ("queries", "queries"),
        "passage_passage": ("passages", "passages"),
        "query_passage": ("queries", "passages"),
    }
    expected = {pair: float(((s[a] @ s[b].T - t[a] @ t[b].T) ** 2).mean()) for pair, (a, b) in sides.items()}
    for pair, value in expected.items():
        assert made("similarity", of=[pair])(views(student, teacher)).item() == pytest.approx(value, rel=1e-10)
    loss = made("similarity")
    assert loss(views(student, teacher)).item() == pytest.approx(np.mean(list(expected.values())), rel=1e-10)
    given = [x.detach().requires_grad_() for x in (student.q_KQD, student.p_KPD)]
    assert torch.autograd.gradcheck(lambda q, p: loss(views(VectorFeatures(q, p), teacher)), given)


def spread_by_hand(x: np.ndarray, keys: list[int]) -> float:
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j and keys[i] != keys[j]]
    cosines = [float(unit(x[i]) @ unit(x[j])) for i, j in pairs]
    return float(np.mean(cosines) ** 2 + max(0, np.mean(np.square(cosines)) - 1 / x.shape[1]))


@pytest.mark.parametrize("width", [2, 5, 64])
def test_spread(width: int) -> None:
    student = vectors(width, 1)
    own = arrays(student)
    keys = list(range(Q * N))
    keys[5] = keys[0]  # one passage stands in two groups
    masked = torch.tensor(keys), torch.tensor(keys[::N])[:, None]
    of_queries = spread_by_hand(own["queries"], list(range(Q)))
    for given, ids in ((None, list(range(Q * N))), (masked, keys)):
        of_passages = spread_by_hand(own["passages"], ids)
        assert of_passages > 0
        seen = views(student, None, keys=given)
        assert made("spread", of=["passages"])(seen).item() == pytest.approx(of_passages, rel=1e-9)
        assert made("spread")(seen).item() == pytest.approx((of_queries + of_passages) / 2, rel=1e-9)
    leaves = [x.detach().requires_grad_() for x in (student.q_KQD, student.p_KPD)]
    assert torch.autograd.gradcheck(lambda q, p: made("spread")(views(VectorFeatures(q, p), None)), leaves)


def test_spread_without_a_pair_is_nothing() -> None:
    assert spread_out(torch.ones(1, 4)).item() == 0
    assert spread_out(torch.ones(2, 4), torch.zeros(2, 2, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["embedding", "similarity", "spread"])
def test_16_bits_are_read_exactly_and_summed_in_more(name: str, dtype: torch.dtype) -> None:
    """Against the same rounded vectors in float64: what is left is float32's own rounding."""
    torch.manual_seed(0)
    loss = made(name).to(dtype)
    narrow = vectors(5, 1, dtype), vectors(7, 2, dtype)
    wide = [VectorFeatures(x.q_KQD.detach().double(), x.p_KPD.detach().double()) for x in narrow]
    value = loss(views(*narrow))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(views(*wide)).item(), rel=2e-6)
    value.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (narrow[0].q_KQD, narrow[0].p_KPD))


@pytest.mark.parametrize("name", ["embedding", "similarity"])
def test_a_teacher_gets_no_gradient_even_if_it_is_trained(name: str) -> None:
    student, teacher = vectors(5, 1), vectors(7, 2)
    made(name)(views(student, teacher, cotrained=True)).backward()
    assert teacher.q_KQD.grad is None
    assert student.q_KQD.grad is not None


@pytest.mark.parametrize(
    ("settings", "widths", "told"),
    [
        (
            {"into": "same"},
            (5, 7),
            r"5 dimensions, the teacher's 7 \(set it to teacher, truncate or pca, or set student",
        ),
        ({"into": "same"}, (7, 5), r"\(set it to teacher, or set student\.projection: 5\)"),
        ({"into": "truncate"}, (7, 5), r"losses\.embedding\.into: truncate needs a teacher as wide.*set it to teacher"),
        ({}, (None, 5), r"losses\.embedding: compares vectors, and the student has none"),
        ({}, (5, None), r"losses\.embedding: compares vectors, and the teacher has none"),
    ],
)
def test_widths_that_cannot_be_compared(settings: dict[str, Any], widths: tuple[Any, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        made("embedding", widths, **settings)


@pytest.mark.parametrize("name", ["embedding", "similarity", "spread"])
def test_models_without_vectors_of_texts(name: str) -> None:
    states, ones = torch.ones(1, Q, 2, 5), torch.ones(Q, 2)
    others: dict[str, Any] = {
        "gives scores": ScoreFeatures(torch.ones(1, Q, N)),
        "gives a vector per token": TokenFeatures(states, ones, states, ones),
    }
    for told, features in others.items():
        with pytest.raises(InputError, match=f"losses.{name}: .*the student {told}"):
            made(name)(views(features, vectors(7, 2)))
        if name != "spread":
            with pytest.raises(InputError, match=f"losses.{name}: .*the teacher {told}"):
                made(name)(views(vectors(5, 1), features))


def test_negatives_that_are_not_there() -> None:
    sides = [Side(VectorFeatures(*(x[:, :Q] for x in (f.q_KQD, f.p_KPD)))) for f in (vectors(5, 1), vectors(7, 2))]
    alone = Views(*sides, Scope(1))
    with pytest.raises(InputError, match=r"losses\.embedding\.of: names kinds of text"):
        made("embedding", of=["negatives"])(alone)
    both = made("embedding")
    torch.manual_seed(0)
    only = made("embedding", of=["queries", "positives"])
    only.load_state_dict(both.state_dict())
    assert both(alone).item() == only(alone).item()


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("embedding", {"of": ["queries", "queries"]}, "twice"),
        ("embedding", {"of": []}, "at least 1"),
        ("embedding", {"of": ["passages"]}, "'queries', 'positives' or 'negatives'"),
        ("embedding", {"into": "svd"}, "cannot be 'svd'"),
        ("similarity", {"of": ["query_query", "query_query"]}, "twice"),
        ("spread", {"of": ["positives"]}, "'queries' or 'passages'"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        LOSSES[name].set(**settings)


def test_off_unless_they_are_given_a_weight() -> None:
    section = losses_section()
    assert {"embedding", "similarity", "spread"} & set(section().active) == set()
    only = {name: {"weight": 0} for name in ("contrastive", "response", "layer")}
    chosen = section.model_validate({**only, "spread": {"weight": 1}})
    assert set(chosen.active) == {"spread"}
    assert not chosen.needs_teacher


def test_only_a_map_is_trained() -> None:
    assert [tuple(x.shape) for x in made("embedding").parameters()] == [(7, 5)]
    for loss in (made("embedding", into="truncate"), made("similarity"), made("spread")):
        assert list(loss.parameters()) == []


def test_pca_and_ridge_are_numpys() -> None:
    student, teacher = vectors(5, 1), vectors(7, 2)
    s, t = (np.concatenate([arrays(x)["queries"], arrays(x)["passages"]]) for x in (student, teacher))
    moments = Moments.of(torch.from_numpy(s), torch.from_numpy(t))
    basis = np.linalg.svd(t, full_matrices=False)[2][:5].T
    kept = moments.directions(5).double().numpy()
    np.testing.assert_allclose(np.abs(kept), np.abs(basis), atol=1e-5)
    np.testing.assert_allclose(moments.ridge(0).numpy(), np.linalg.lstsq(s, t, rcond=None)[0].T, atol=1e-4)

    loss = made("embedding", into="pca", distance="l2")
    loss.fit(moments)
    kinds = ("queries", "positives", "negatives")
    expected = np.mean([distance(arrays(student)[k], unit(arrays(teacher)[k] @ kept), "l2") for k in kinds])
    assert loss(views(student, teacher)).item() == pytest.approx(expected, rel=1e-5)
    assert not loss.state_dict()
    ridge = made("embedding", start="ridge")
    ridge.fit(moments)
    torch.testing.assert_close(ridge.map.detach(), moments.ridge())
    assert (loss.sample, ridge.sample, made("embedding").sample) == (4096, 4096, 0)


def test_layers_of_embedding_count_as_the_final_vectors_do() -> None:
    student, teacher = vectors(5, 1), vectors(5, 2)
    layers = [vectors(5, 3), vectors(5, 4)]
    loss = made("embedding", (5, 5), into="same", teacher_layers=[1], student_layers=[2])
    assert "layers" in loss.needs
    found = loss(Views(Side(student, layers[0]), Side(teacher, layers[1]), Scope(N)))
    plain = made("embedding", (5, 5), into="same")
    expected = (plain(views(student, teacher)) + plain(views(*layers))) / 2
    torch.testing.assert_close(found, expected)


def test_order_of_triplets() -> None:
    student, teacher = vectors(5, 1), vectors(7, 2)
    s, t = (unit(arrays(x)["queries"]) @ unit(arrays(x)["passages"]).T for x in (student, teacher))
    hinges = [
        max(0.0, 0.1 - (s[a, b] - s[a, c]))
        for a in range(Q)
        for b in range(Q * N)
        for c in range(Q * N)
        if t[a, b] > t[a, c]
    ]
    loss = made("order", of=["query_passage"], margin=0.1)
    assert loss(views(student, teacher)).item() == pytest.approx(np.mean(hinges), rel=1e-5)
    assert loss(views(teacher, teacher)).item() < loss(views(student, teacher)).item()


def test_focal_weights_carry_no_gradient() -> None:
    logits = torch.randn(1, Q, N, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).requires_grad_()
    scores = ScoreFeatures(logits)
    loss = made("focal", gamma=2.0, temperature=0.5)(Views(Side(scores), None, Scope(N)))
    nll = torch.nn.functional.cross_entropy(
        logits[0].detach().float() / 0.5, torch.zeros(Q, dtype=torch.long), reduction="none"
    )
    weights = (1 - (-nll).exp()) ** 2
    assert loss.item() == pytest.approx((weights * nll).mean().item(), rel=1e-5)
    [gradient] = torch.autograd.grad(loss, logits)
    again = torch.nn.functional.cross_entropy(
        logits[0].float() / 0.5, torch.zeros(Q, dtype=torch.long), reduction="none"
    )
    [expected] = torch.autograd.grad((weights * again).mean(), logits)
    torch.testing.assert_close(gradient, expected)
