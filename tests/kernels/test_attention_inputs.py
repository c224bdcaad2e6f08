"""What the attention kernels are handed: views of any layout, and numbers that are none."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lead_ds.kernels import attention_kl, grouped_attention_kl, interaction_attention

IMPLEMENTATIONS = ["torch", "triton"]
NAMES = ["tq", "tk", "sq", "sk"]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.node.callspec.params.get("impl") == "triton":
        return request.getfixturevalue("triton_device")
    return torch.device("cpu")


def inputs(device: torch.device) -> dict[str, Tensor]:
    given = {name: torch.randn(2, 2, 19, 16, device=device) for name in NAMES}
    mask = torch.ones(2, 19, dtype=torch.long, device=device)
    mask[1, 11:] = 0
    return given | {"mask": mask, "grad": torch.randn(2, device=device)}


def results(given: dict[str, Tensor], impl: str, **how: Any) -> list[Tensor]:
    """Value and gradients of two layer pairs alike, through a gradient of any layout."""
    tq, tk, sq, sk = (given[name].detach() for name in NAMES)
    sq.requires_grad_()
    sk.requires_grad_()
    values = attention_kl([tq, tq], [tk, tk], [sq, sq], [sk, sk], given["mask"], per_pair=True, impl=impl, **how)
    return [values.detach(), *torch.autograd.grad(values, (sq, sk), given["grad"])]


def strided(x: Tensor) -> Tensor:
    """The same numbers, none beside its neighbour."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", [*NAMES, "mask", "grad"])
def test_strided_inputs(which: str, impl: str, head_mean: bool, device: torch.device) -> None:
    given = inputs(device)
    expected = results(given, impl, head_mean=head_mean)
    assert not strided(given[which]).is_contiguous()
    for found, right in zip(
        results(given | {which: strided(given[which])}, impl, head_mean=head_mean), expected, strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_expanded_inputs(impl: str, device: torch.device) -> None:
    """All heads share one key: a stride of 0."""
    given = inputs(device)
    given["tk"], given["sk"] = (given[name][:, :1].expand(2, 2, 19, 16) for name in ("tk", "sk"))
    whole = given | {name: given[name].contiguous() for name in ("tk", "sk")}
    for found, right in zip(results(given, impl), results(whole, impl), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", NAMES)
def test_nan_in_is_nan_out(which: str, impl: str, head_mean: bool, device: torch.device) -> None:
    given = inputs(device)
    given[which][0, 1, 3, 5] = float("nan")
    value, dq, dk = results(given, impl, head_mean=head_mean)
    assert value.isnan().all()
    assert dq[0, 1].isnan().any()
    assert dk[0, 1].isnan().any()
    assert not dq[1].isnan().any()


@pytest.mark.parametrize("which", NAMES)
def test_nan_in_is_nan_out_of_word_groups(which: str) -> None:
    given = inputs(torch.device("cpu"))
    given[which][0, 1, 3, 5] = float("nan")
    groups = torch.arange(19).expand(2, -1)
    assert grouped_attention_kl(*(given[name] for name in NAMES), groups, groups).isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_interaction_keeps_nan(which: int, divergence: str, impl: str, device: torch.device) -> None:
    tensors = [torch.randn(1, 2, 7, 16, device=device) for _ in range(4)]
    tensors[which][0, 1, 3, 5] = float("nan")
    assert interaction_attention(*tensors, divergence=divergence, impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", range(6))
def test_interaction_takes_strided_inputs(which: int, impl: str, device: torch.device) -> None:
    masks = [torch.rand(2, 7, device=device) > 0.3 for _ in range(2)]
    given = [*(torch.randn(1, 2, 7, 16, device=device) for _ in range(4)), *masks]
    expected = interaction_attention(*given, impl=impl)
    given[which] = strided(given[which])
    torch.testing.assert_close(interaction_attention(*given, impl=impl), expected, rtol=1e-6, atol=1e-7)
