"""Products of 16-bit vectors against float64, and what autograd keeps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lead_ds.kernels.layer_kl import inputs
from lead_ds.kernels.products import products
from lead_ds.losses.divergence import relevance_kl
from lead_ds.relevance import Scale, TokenFeatures, VectorFeatures
from tests.kernels.oracle import assert_as_accurate_as_eager

HALVES = [torch.bfloat16, torch.float16]


def evaluate(q: Tensor, p: Tensor, weight: Tensor, cosine: bool) -> list[Tensor]:
    q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
    scores = products(q, p, cosine=cosine)
    return [scores.detach(), *torch.autograd.grad((scores * weight.to(scores.dtype)).sum(), (q, p))]


def eager(q: Tensor, p: Tensor, weight: Tensor, cosine: bool) -> list[Tensor]:
    q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
    one, other = (torch.nn.functional.normalize(x, dim=-1) if cosine else x for x in (q, p))
    scores = one @ other.mT
    return [scores.detach(), *torch.autograd.grad((scores * weight.to(scores.dtype)).sum(), (q, p))]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_values_and_gradients(dtype: torch.dtype, cosine: bool, scale: float) -> None:
    """Gradients of 1e-7 are nothing in float16: they come out all the same, as large as the dtype can hold."""
    q, p = torch.randn(3, 7, 40).to(dtype), (2 + torch.randn(3, 19, 40)).to(dtype)  # near each other: cosines cancel
    weight = torch.randn(3, 7, 19) * scale
    found, exact = evaluate(q, p, weight, cosine), evaluate(q.double(), p.double(), weight, cosine)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    if scale == 1.0:
        for name, one, other, true in zip("qp", found[1:], eager(q, p, weight, cosine)[1:], exact[1:], strict=True):
            assert one.dtype == dtype
            assert_as_accurate_as_eager(one, other, true, dtype, name)
    else:
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for one, true in zip(found[1:], exact[1:], strict=True):
            assert (one.double() - true).abs().max() < 2e-2 * true.abs().max() + step


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", ["none", "cosine", "standard"])
def test_relevance_keeps_vectors_in_16_bits(dtype: torch.dtype, scale: str) -> None:
    """Of every scale, of a query's own passages and of all: no float32 copy of the vectors is kept for the backward pass."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    width, group = 48, 3
    vectors = [torch.randn(2, n, width).to(dtype).requires_grad_() for n in (4, 12)]
    tokens = [torch.randn(2, n, 5, width).to(dtype).requires_grad_() for n in (4, 12)]
    masks = torch.ones(4, 5), torch.ones(12, 5)
    given = (
        VectorFeatures(*vectors, scale=scale),  # type: ignore[arg-type]
        TokenFeatures(tokens[0], masks[0], tokens[1], masks[1], scale=scale),  # type: ignore[arg-type]
    )
    for features in given:
        for own in (True, False):
            if isinstance(features, TokenFeatures) and not own:
                continue  # the kernel's, see test_dtypes
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                relevance = features.group_relevance(group) if own else features.relevance()
                logits = relevance.logits
            assert logits.dtype == torch.float32
            wide = [x.shape for x in kept if x.dtype == torch.float32 and x.shape[-1] == width]
            assert not wide, (type(features).__name__, own, wide)
            assert any(x.dtype == dtype and x.shape[-1] == width for x in kept)


@pytest.mark.parametrize("scale", ["none", "cosine", "standard"])
def test_the_kernel_is_given_16_bits(
    scale: Scale, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every scale whose map is not held; what scales the scores is in 32."""
    monkeypatch.setattr(inputs, "_STORED_SCORES", 0)
    given: dict[str, list[torch.dtype]] = {}

    class Traced(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given[str(func)] = [x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()]
            return func(*args, **(kwargs or {}))

    def side() -> tuple[VectorFeatures, list[Tensor]]:
        both = [torch.randn(2, n, 16).to(triton_device, torch.bfloat16) for n in (4, 12)]
        return VectorFeatures(*both, scale=scale), both

    (teacher, _), (student, learns) = side(), side()
    for x in learns:
        x.requires_grad_()
    with Traced():
        kl, _ = relevance_kl(teacher.relevance(), student.relevance(), torch.arange(4).to(triton_device), impl="triton")
        kl.sum().backward()
    scales = [torch.float32] * (2 if scale == "standard" else 0)
    assert given["lead_ds.layer_kl.default"] == [torch.bfloat16] * 4 + scales
    assert "lead_ds.layer_kl_backward.default" in given
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in learns)
