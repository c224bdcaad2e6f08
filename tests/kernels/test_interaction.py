"""interaction_attention against its float64 reference and against the published loss's golden values."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lead_ds.kernels.interaction import op as interaction
from lead_ds.kernels.interaction.op import interaction_attention
from tests.kernels.references import interaction_reference

SHARED = Path(os.environ.get("LEAD_DS_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "de_virt.npz"
K, Q, N, LQ, LD = 2, 3, 4, 5, 19
SLACK = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def tensors(dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    shapes = ((K, Q, LQ, 24), (K, Q * N, LD, 24), (K, Q, LQ, 16), (K, Q * N, LD, 16))
    return [torch.randn(shape).to(dtype).to(device) for shape in shapes]


def masks(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    q_mask, d_mask = (torch.rand(Q, LQ) > 0.3).long(), (torch.rand(Q * N, LD) > 0.3).long()
    q_mask[:, 0], d_mask[:, 0] = 1, 1
    d_mask[2] = 0  # an empty passage
    return q_mask.to(device), d_mask.to(device)


def evaluate(function: Any, inputs: list[Tensor], *rest: Any, **arguments: Any) -> list[Tensor]:
    tq, td, sq, sd = inputs
    sq, sd = sq.detach().requires_grad_(), sd.detach().requires_grad_()
    value = function(tq, td, sq, sd, *rest, **arguments)
    return [x.detach().double().cpu() for x in (value, *torch.autograd.grad(value * 2, (sq, sd)))]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the implementation under test runs."""
    if request.node.callspec.params["impl"] == "triton":
        return request.getfixturevalue("triton_device")
    return torch.device("cpu")


@pytest.mark.parametrize("chunk", [1 << 18, 300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pairs", ["all", "own"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_matches_the_reference(
    impl: str,
    divergence: str,
    pairs: str,
    masked: bool,
    chunk: int,
    device: torch.device,
    triton_dtypes: tuple[torch.dtype, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interaction, "_CPU_CHUNK", chunk)
    monkeypatch.setattr(interaction, "_GPU_CHUNK", chunk)
    hidden = masks(device) if masked else (None, None)
    arguments = {"divergence": divergence, "pairs": pairs, "teacher_scale": 0.3, "student_scale": 0.4}
    dtypes = triton_dtypes if impl == "triton" else (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        inputs = tensors(dtype, device)
        exact = evaluate(interaction_reference, [x.double() for x in inputs], *hidden, **arguments)
        eager = evaluate(interaction_reference, inputs, *hidden, **arguments)
        if masked:
            inputs = [
                x.masked_fill((mask == 0)[None, :, :, None], float("nan"))
                for x, mask in zip(inputs, hidden * 2, strict=True)
            ]
        found = evaluate(interaction_attention, inputs, *hidden, impl=impl, **arguments)
        for name, x, plain, truth in zip(("value", "dq", "dd"), found, eager, exact, strict=True):
            assert torch.isfinite(x).all(), (name, dtype)
            allowed = 2 * (plain - truth).abs().max() + SLACK[dtype] * truth.abs().max()
            assert (x - truth).abs().max() <= allowed, (name, dtype)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_identical_models_give_exactly_zero(impl: str, divergence: str, device: torch.device) -> None:
    q, d = torch.randn(Q, LQ, 16, device=device) * 3, torch.randn(Q * N, LD, 16, device=device)
    for x in evaluate(interaction_attention, [q, d, q, d], *masks(device), divergence=divergence, impl=impl):
        assert not x.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_real_gives_zero(impl: str, device: torch.device) -> None:
    inputs = tensors(torch.float32, device)
    q_mask, d_mask = masks(device)
    for hidden in ((q_mask * 0, d_mask), (q_mask, d_mask * 0)):
        for x in evaluate(interaction_attention, inputs, *hidden, impl=impl):
            assert not x.any()


@pytest.mark.parametrize("pairs", ["all", "own"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_reference_gradient_is_that_of_its_value(divergence: str, pairs: str) -> None:
    tq, td, sq, sd = (x[:, :, :4, :6] for x in tensors(torch.float64))
    q_mask, d_mask = (mask[:, :4] for mask in masks())
    assert torch.autograd.gradcheck(
        lambda q, d: interaction_reference(tq, td, q, d, q_mask, d_mask, divergence=divergence, pairs=pairs),
        (sq.requires_grad_(), sd.requires_grad_()),
    )


def test_wrong_arguments_are_refused() -> None:
    tq, td, sq, sd = tensors(torch.float32)
    for change, what in (
        ({"divergence": "js"}, "unknown divergence"),
        ({"pairs": "some"}, "unknown pairs"),
        ({"sd": sd[:, :, :-1]}, "same tokenisation"),
        ({"td": td[..., :-1]}, "width"),
        ({"q_mask": torch.ones(Q, LQ + 1)}, "q_mask must be"),
        ({"td": td[:, :-1], "sd": sd[:, :-1], "pairs": "own"}, "11 passages for 3 queries"),
        ({"tq": tq.clone().requires_grad_()}, "detach"),
    ):
        arguments: dict[str, Any] = {"tq": tq, "td": td, "sq": sq, "sd": sd} | change
        with pytest.raises(ValueError, match=what):
            interaction_attention(**arguments)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference's golden values are not here (set LEAD_DS_SHARED)")
def test_golden_values_of_the_published_loss() -> None:
    """The attention part, and - with the loss's other parts written out here - the total and its gradients."""
    with np.load(GOLDEN, allow_pickle=False) as archive:
        golden = {name: archive[name] for name in archive.files}
    meta = json.loads(str(golden["meta"]))
    x = {name: torch.from_numpy(array) for name, array in golden.items() if array.dtype == np.float32}
    names = ("student_query_layers", "student_passage_layers", "student_query", "student_passage")
    s_q, s_d, final_q, final_d = (x[name].requires_grad_() for name in names)
    t_pick, s_pick = meta["selected_teacher"], meta["selected_student"]

    def mask(name: str, length: int) -> Tensor:
        return torch.arange(length) < torch.from_numpy(golden[name])[:, None]

    attention = interaction_attention(
        x["teacher_tq"][:, t_pick].transpose(0, 1),
        x["teacher_td"][:, t_pick].transpose(0, 1),
        s_q[:, s_pick].transpose(0, 1),
        s_d[:, s_pick].transpose(0, 1),
        mask("query_length", s_q.shape[2]),
        mask("passage_length", s_d.shape[2]),
        divergence="mse",
    )
    torch.testing.assert_close(attention.item(), meta["parts"]["loss_de_db_attention"], rtol=1e-5, atol=0)

    queries, per_query = meta["queries"], meta["passages_per_query"]
    target = torch.arange(queries) * per_query

    def kl(teacher: Tensor, student: Tensor) -> Tensor:
        goal = (teacher / meta["temperature"]).softmax(-1)
        return (goal * (goal.log() - student.log_softmax(-1))).sum(-1).mean()

    scores, teacher_scores = final_q @ final_d.T, x["teacher_te_q"] @ x["teacher_te_d"].T
    layers, nlls = [], []
    for t, s in zip(t_pick, s_pick, strict=True):
        teacher = x["teacher_tq"][:, t, 0] @ x["teacher_td"][:, t, 0].T
        layers.append(kl(teacher, s_q[:, s, 0] @ s_d[:, s, 0].T))
        nlls.append(torch.nn.functional.cross_entropy(teacher, target))
    weights = (-torch.stack(nlls) / meta["layer_temperature"]).softmax(0)
    total = torch.nn.functional.cross_entropy(scores, target) + kl(teacher_scores, scores)
    total = total + (weights * torch.stack(layers)).sum() + attention
    torch.testing.assert_close(total.item(), meta["loss"], rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(total, (s_q, s_d, final_q, final_d))
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, x[f"grad_{name}"], rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
