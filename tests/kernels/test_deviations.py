"""The deviation of each query's scores by blocks: as torch takes it from the whole map, and no map is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lead_ds.kernels import deviations
from lead_ds.kernels.deviations import inverse_deviations
from tests.kernels.oracle import assert_as_accurate_as_eager

SHAPE = (3, 7, 19, 24)  # K, Q, P, D


@pytest.fixture(params=["one block", "layers apart", "a row at a time"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    at_once = {"one block": 1 << 21, "layers apart": SHAPE[1] * SHAPE[2], "a row at a time": 1}[request.param]
    monkeypatch.setattr(deviations, "_BLOCK_SCORES", at_once)
    return request.param


def make(dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    layers, queries, passages, width = SHAPE
    q = torch.randn(layers, queries, width).to(dtype).requires_grad_()
    p = (torch.randn(layers, passages, width) + 0.5).to(dtype).requires_grad_()
    mask = torch.rand(queries, passages) > 0.4
    mask[:, :2] = True
    return q, p, mask if masked else None


def eager(q: Tensor, p: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ p.mT
    rows = [[row if mask is None else row[mask[i]] for i, row in enumerate(layer)] for layer in scores]
    return torch.stack([torch.stack([row.std(correction=0) for row in layer]) for layer in rows]).reciprocal()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_values_and_gradients(dtype: torch.dtype, masked: bool, blocks: str) -> None:
    q, p, mask = make(dtype, masked)
    weight = torch.randn(SHAPE[:2], dtype=torch.float64)

    def evaluate(which: object, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        found = which(q, p, mask)  # type: ignore[operator]
        return found, *torch.autograd.grad(found, (q, p), weight.to(found.dtype))

    exact = evaluate(eager, *(x.detach().double().requires_grad_() for x in (q, p)))
    found, near = evaluate(inverse_deviations, q, p), evaluate(eager, q, p)
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in found[1:]] == [dtype, dtype]
    for name, got, other, true in zip(("deviations", "dq", "dp"), found, near, exact, strict=True):
        assert_as_accurate_as_eager(got, other, true, dtype, name)


def test_gradcheck(blocks: str) -> None:
    q, p, mask = make(torch.float64, True)
    assert torch.autograd.gradcheck(lambda q, p: inverse_deviations(q, p, mask), (q, p))


def test_one_side_may_be_constant(blocks: str) -> None:
    q, p, mask = make(torch.float32, True)
    both = torch.autograd.grad(inverse_deviations(q, p, mask).sum(), (q, p))
    (alone,) = torch.autograd.grad(inverse_deviations(q, p.detach(), mask).sum(), q)
    assert torch.equal(alone, both[0])


def test_scores_that_are_equal_or_none_are_finite() -> None:
    q, p = torch.randn(1, 2, 8).requires_grad_(), torch.ones(1, 5, 8).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    found = inverse_deviations(q, p, mask)
    assert ((found > 0) & (found <= 1.01e6)).all()
    for grad in torch.autograd.grad(found.sum(), (q, p)):
        assert grad.isfinite().all()


def test_nan_in_is_nan_out(blocks: str) -> None:
    q, p, _ = make(torch.float32, False)
    with torch.no_grad():
        p[1, 3, 5] = float("nan")
    assert inverse_deviations(q, p).isnan().all(1).tolist() == [False, True, False]
