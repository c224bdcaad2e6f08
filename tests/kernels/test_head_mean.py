"""The kernel of head-averaged attention maps against its float64 reference: in the interpreter, or on a GPU."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lead_ds.kernels import attention_kl, launch
from tests.kernels.references import attention_kl_reference
from tests.kernels.test_attention_kl import MASKS, assert_as_good_as_eager, evaluate, mask_of, poison

# name: B, teacher heads, their key heads, student heads, their key heads, L, dt, ds, arguments
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, dict[str, Any]]] = {
    "one token": (2, 2, 2, 3, 3, 1, 8, 16, {}),
    "other numbers of heads": (2, 3, 3, 2, 2, 17, 8, 16, {}),
    "grouped both ways": (2, 4, 2, 6, 2, 34, 16, 24, {"temperature": 2.0}),
    "causal": (1, 2, 2, 1, 1, 63, 16, 8, {"causal": True}),
    "band": (1, 2, 2, 2, 2, 65, 16, 16, {"band": 9}),
    "causal band grouped": (1, 2, 1, 4, 2, 65, 16, 16, {"band": 20, "causal": True}),
    "wide": (2, 2, 1, 2, 2, 17, 200, 256, {}),
    "relation": (2, 4, 2, 8, 8, 33, 16, 4, {"relation_heads": 2, "teacher_scale": 0.3, "student_scale": 0.2}),
}


def tensors(name: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    batch, t_heads, t_keys, s_heads, s_keys, length, t_width, s_width, _ = SHAPES[name]
    shapes = ((t_heads, t_width), (t_keys, t_width), (s_heads, s_width), (s_keys, s_width))
    return [torch.randn(batch, heads, length, width).to(dtype).to(device) for heads, width in shapes]


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, mask) for name in SHAPES for mask in (MASKS if "other" in name else ("none", "holes"))],
)
def test_it_matches_the_reference(
    name: str, mask: str, triton_device: torch.device, triton_dtypes: tuple[torch.dtype, ...]
) -> None:
    batch, length, arguments = SHAPES[name][0], SHAPES[name][5], SHAPES[name][8]
    hidden = mask_of(mask, batch, length)
    for dtype in triton_dtypes:
        inputs = tensors(name, dtype, triton_device)
        assert_as_good_as_eager(inputs, hidden, arguments | {"head_mean": True}, impl="triton")


@pytest.mark.parametrize("name", ["grouped both ways", "causal band grouped"])
def test_it_is_what_torch_computes(name: str, triton_device: torch.device) -> None:
    inputs, mask = tensors(name, torch.float32, triton_device), mask_of("holes", SHAPES[name][0], SHAPES[name][5])
    arguments = SHAPES[name][8] | {"head_mean": True}
    kernel, chunked = (evaluate(attention_kl, inputs, mask, impl=impl, **arguments) for impl in ("triton", "torch"))
    for found, other in zip(kernel, chunked, strict=True):
        torch.testing.assert_close(found, other, atol=1e-6, rtol=1e-5)


# The interpreter tells of overflow in rows of hidden keys, which the kernel computes and does not store.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_large_offsets_cost_no_digits(triton_device: torch.device) -> None:
    for offset in (300.0, 3000.0):
        inputs = tensors("causal", torch.float32, triton_device)
        for q, k, sign in ((inputs[0], inputs[1], 1), (inputs[2], inputs[3], -1)):
            q[..., 0], k[..., 0] = sign * offset, 1.0
        arguments = {"teacher_scale": 1.0, "student_scale": 1.0, "head_mean": True}
        exact = evaluate(attention_kl_reference, [x.double() for x in inputs], None, **arguments)
        found = evaluate(attention_kl, inputs, None, **arguments, impl="triton")
        assert (found[0] - exact[0]).abs() < 1e-5 * max(1.0, float(exact[0]))
        for x, truth in zip(found[1:], exact[1:], strict=True):
            assert (x - truth)[..., 1:].norm() < 1e-4 * truth[..., 1:].norm() * max(1.0, offset / 300)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_means_below_the_smallest_float32_count(triton_device: torch.device) -> None:
    """A key that every student head gives e^-200, and the teacher much: 0 in float32, but not its logarithm."""
    inputs = [torch.randn(1, 2, 9, 16) for _ in range(4)]
    inputs[2][..., 0], inputs[3][..., 0] = 20.0, torch.tensor([-10.0, *[0.0] * 8])
    inputs = [x.to(triton_device) for x in inputs]
    arguments = {"student_scale": 1.0, "head_mean": True}
    exact = evaluate(attention_kl_reference, [x.double() for x in inputs], None, **arguments)
    assert exact[0] > 20  # of it three times, by such keys
    for found, truth in zip(evaluate(attention_kl, inputs, None, **arguments, impl="triton"), exact, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_identical_models_give_exactly_zero(mask: str, triton_device: torch.device) -> None:
    q, k = torch.randn(2, 2, 35, 16) * 4, torch.randn(2, 1, 35, 16)
    inputs = [x.to(triton_device) for x in (q, k, q, k)]
    for result in evaluate(attention_kl, inputs, mask_of(mask, 2, 35), head_mean=True, impl="triton"):
        assert not result.any()


def test_one_head_is_its_own_mean(triton_device: torch.device) -> None:
    inputs = [torch.randn(2, 1, 19, 16, device=triton_device) for _ in range(4)]
    mean, single = (evaluate(attention_kl, inputs, None, impl="triton", head_mean=mean) for mean in (True, False))
    for found, other in zip(mean, single, strict=True):
        torch.testing.assert_close(found, other, atol=1e-6, rtol=1e-5)


def test_nothing_real_gives_zero(triton_device: torch.device) -> None:
    inputs = tensors("other numbers of heads", torch.float32, triton_device)
    mask = torch.zeros(2, 17)
    for given, hidden in ((poison(inputs, mask), mask), ([x[:0] for x in inputs], None)):
        for result in evaluate(attention_kl, given, hidden, impl="triton", head_mean=True):
            assert not result.any()
    assert evaluate(attention_kl, [x[:, :, :0] for x in inputs], None, impl="triton", head_mean=True)[0] == 0


def test_layer_pairs_of_different_shapes_share_a_call(triton_device: torch.device) -> None:
    kinds = ["other numbers of heads", "one head", "other numbers of heads"]
    pairs = []
    for kind in kinds:
        heads = (1, 1, 4, 2) if kind == "one head" else (3, 3, 2, 2)
        pairs.append(
            [torch.randn(2, h, 17, w, device=triton_device) for h, w in zip(heads, (8, 8, 16, 16), strict=True)]
        )
    students = [x.requires_grad_() for pair in pairs for x in pair[2:]]
    mask = mask_of("right", 2, 17)
    assert mask is not None
    mask = mask.to(triton_device)
    columns = [list(column) for column in zip(*pairs, strict=True)]
    values = attention_kl(*columns, mask, per_pair=True, band=[None, 5, None], head_mean=True, impl="triton")
    weights = torch.tensor([1.0, 0.5, 2.0], device=triton_device)
    gradients = torch.autograd.grad((values * weights).sum(), students)
    for k, pair in enumerate(pairs):
        alone = attention_kl_reference(*pair, mask, band=5 if k == 1 else None, head_mean=True)
        torch.testing.assert_close(values[k], alone, atol=1e-6, rtol=1e-5)
        expected = torch.autograd.grad(alone * weights[k], (pair[2], pair[3]))
        torch.testing.assert_close(gradients[2 * k : 2 * k + 2], expected, atol=1e-6, rtol=1e-4)


def test_no_kernel_is_given_a_map(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels read and write grows with the length, not with its square; without a gradient less is kept."""
    sizes: dict[tuple[int, bool], int] = {}

    def observe(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        here = length, with_grad
        sizes[here] = sizes.get(here, 0) + sum(x.numel() for x in arguments if isinstance(x, Tensor))

    monkeypatch.setattr(launch, "observers", [observe])
    for with_grad in (True, False):
        for length in (32, 64, 96):
            inputs = [torch.randn(1, 2, length, 16, device=triton_device, requires_grad=i > 1) for i in range(4)]
            with torch.set_grad_enabled(with_grad):
                value = attention_kl(*[x.detach() for x in inputs[:2]], *inputs[2:], head_mean=True, impl="triton")
            if with_grad:
                value.backward()
        steps = [sizes[b, with_grad] - sizes[a, with_grad] for a, b in pairwise((32, 64, 96))]
        assert abs(steps[1] - steps[0]) <= 4  # what is written once a tile
    assert all(sizes[length, False] < sizes[length, True] for length in (32, 64, 96))
