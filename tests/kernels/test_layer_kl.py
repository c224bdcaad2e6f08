"""layer_kl: chunked torch and Triton, with stored and with recomputed scores, against the float64 reference."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lead_ds.kernels import Factors
from lead_ds.kernels import factors_kl as fused
from lead_ds.kernels import layer_kl as public
from lead_ds.kernels.layer_kl import chunked, inputs
from tests.kernels.oracle import assert_as_accurate_as_eager
from tests.kernels.references import layer_kl_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# K, Q, P, Dt, Ds: ones, tiles that are filled and that are not, teacher and student of different widths.
SHAPES = [(1, 1, 1, 8, 8), (2, 5, 17, 24, 40), (1, 65, 129, 64, 16), (2, 17, 63, 128, 130)]
TEMPERATURES = [(1.0, 1.0), (2.0, 0.5)]


class Batch(NamedTuple):
    """Arguments of layer_kl in their order."""

    tq: Tensor
    td: Tensor
    sq: Tensor
    sd: Tensor
    target: Tensor

    def double(self) -> "Batch":
        tq, td, sq, sd = (vectors.detach().double() for vectors in self[:4])
        return Batch(tq, td, sq.requires_grad_(), sd.requires_grad_(), self.target)


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(impl: str, request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if impl == "torch" else request.getfixturevalue("triton_device")


@pytest.fixture(params=["stored", "recomputed"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether score maps are small enough to keep; recomputed ones come in several chunks."""
    if request.param == "recomputed":
        monkeypatch.setattr(inputs, "_STORED_SCORES", 0)
        monkeypatch.setattr(inputs, "_RESIDUAL_SHARE", 0)
        monkeypatch.setattr(chunked, "_CHUNK_SCORES", 100)
        monkeypatch.setattr(chunked, "_CHUNK_ROWS", 4)
        if "triton_device" in request.fixturenames or request.getfixturevalue("impl") == "triton":
            from lead_ds.kernels.layer_kl import triton_kernel

            monkeypatch.setattr(triton_kernel, "_WORKSPACE", 5000)
    return request.param


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Batch:
    layers, queries, passages, *widths = shape
    teacher, student = (
        [(torch.randn(layers, count, width) * width**-0.25).to(device, dtype) for count in (queries, passages)]
        for width in widths
    )
    target = torch.randint(0, passages, (queries,)).to(device)
    return Batch(*teacher, student[0].requires_grad_(), student[1].requires_grad_(), target)


def layer_kl(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    cosine: tuple[bool, bool] = (False, False),
    scale: tuple[Tensor | None, Tensor | None] = (None, None),
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The kernel, called as the reference is."""
    teacher = Factors(tq, td, teacher_temperature, cosine[0], scale[0])
    return fused(teacher, Factors(sq, sd, student_temperature, cosine[1], scale[1]), target, **arguments)


@pytest.fixture(
    params=[(shape, masked) for shape in [(2, 5, 17, 24, 40), (1, 65, 129, 64, 16)] for masked in (False, True)],
    ids=lambda case: f"{case[0]}-{'masked' if case[1] else 'full'}",
)
def batches(
    request: pytest.FixtureRequest, device: torch.device, triton_dtypes: tuple[torch.dtype, ...]
) -> list[tuple[Batch, Tensor | None]]:
    """A batch of each dtype that Triton has, and its mask."""
    shape, masked = request.param
    return [
        (make(shape, dtype, device), (torch.rand(shape[1], shape[2]) > 0.4).to(device) if masked else None)
        for dtype in triton_dtypes
    ]


def check(
    batch: Batch,
    temperatures: tuple[float, float],
    mask: Tensor | None,
    impl: str,
    cosine: tuple[bool, bool] = (False, False),
) -> None:
    dtype = batch.sq.dtype
    kl, nll = layer_kl(*batch, *temperatures, mask=mask, cosine=cosine, impl=impl)
    weight = torch.randn(kl.shape, dtype=torch.float64).to(kl.device)
    grads = torch.autograd.grad(kl, (batch.sq, batch.sd), weight.to(kl.dtype))
    exact_batch = batch.double()
    exact = layer_kl_reference(*exact_batch, *temperatures, mask=mask, cosine=cosine)
    exact_grads = torch.autograd.grad(exact[0], (exact_batch.sq, exact_batch.sd), weight)
    # Eager cosines are taken in float32: float16 holds neither the square of a length nor the guard against 0.
    plain = [x.float() for x in batch[:4]] if any(cosine) else batch[:4]
    eager = layer_kl_reference(*plain, batch.target, *temperatures, mask=mask, cosine=cosine)
    eager_grads = torch.autograd.grad(eager[0], (batch.sq, batch.sd), weight.to(eager[0].dtype))
    assert not nll.requires_grad
    assert kl.dtype == nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    for name, got, near, true in zip(
        ("kl", "nll", "dsq", "dsd"), (kl, nll, *grads), (*eager, *eager_grads), (*exact, *exact_grads), strict=True
    ):
        assert_as_accurate_as_eager(got, near, true, dtype, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_values_and_gradients_match_the_reference(
    shape: tuple[int, ...],
    temperatures: tuple[float, float],
    masked: bool,
    memory: str,
    impl: str,
    device: torch.device,
    triton_dtypes: tuple[torch.dtype, ...],
) -> None:
    dtypes = triton_dtypes if impl == "triton" else (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        batch = make(shape, dtype, device)
        mask = (torch.rand(shape[1], shape[2]) > 0.4).to(device) if masked else None
        check(batch, temperatures, mask, impl)


@pytest.mark.parametrize("cosine", [(True, True), (True, False), (False, True)], ids=str)
def test_cosines_match_the_reference(
    batches: list[tuple[Batch, Tensor | None]], cosine: tuple[bool, bool], memory: str, impl: str
) -> None:
    """At a temperature as cosines need; vectors of very different lengths."""
    for batch, mask in batches:
        with torch.no_grad():
            for x in batch[:4]:
                x *= torch.logspace(-1, 1, x.shape[1], device=x.device)[:, None]
        temperatures = tuple(0.1 if side else 20.0 for side in cosine)
        check(batch, temperatures, mask, impl, cosine)


def test_scaled_rows_match_the_reference(
    batches: list[tuple[Batch, Tensor | None]], memory: str, impl: str, device: torch.device
) -> None:
    """Each query's scores times a number of its own, over three decades, which has a gradient, too."""
    for batch, mask in batches:
        dtype, (layers, queries) = batch.sq.dtype, batch.sq.shape[:2]
        scales = [(torch.rand(layers, queries, 2) * 3 - 2).exp2().to(device)[..., 0] for _ in range(2)]  # strided
        scales[1].requires_grad_()
        with torch.no_grad():
            for x, scale in ((batch.tq, scales[0]), (batch.sq, scales[1])):
                lengths = torch.logspace(-1.5, 1.5, x.shape[1], device=device)
                x *= lengths[:, None]
                scale /= lengths  # logits stay in range
        weight = torch.randn(layers, dtype=torch.float64).to(device)

        def evaluate(
            which: Any, batch: Batch, *scales: Tensor, mask: Any = mask, weight: Any = weight, **how: Any
        ) -> Any:
            kl, nll = which(*batch, mask=mask, scale=scales, **how)
            return kl, nll, *torch.autograd.grad(kl, (batch.sq, batch.sd, scales[1]), weight.to(kl.dtype))

        found = evaluate(layer_kl, batch, *scales, impl=impl)
        exact = evaluate(layer_kl_reference, batch.double(), *(x.detach().double().requires_grad_() for x in scales))
        eager = evaluate(layer_kl_reference, batch, *scales)
        assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype, torch.float32]
        for name, got, near, true in zip(("kl", "nll", "dsq", "dsd", "dscale"), found, eager, exact, strict=True):
            assert_as_accurate_as_eager(got, near, true, dtype, name)


@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("impl", ["torch"])
def test_where_most_probabilities_underflow(temperatures: tuple[float, float], memory: str, impl: str) -> None:
    """A target's, too, from which a row's sum is taken otherwise."""
    batch = make((2, 9, 40, 16, 24), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for x in batch[:4]:
            x *= 8
    assert (torch.bmm(batch.tq, batch.td.mT).softmax(-1) < 1e-38).float().mean() > 0.5
    check(batch, temperatures, None, impl)


def test_16_bits_are_as_exact_as_32(memory: str, impl: str, device: torch.device) -> None:
    """Products of 16-bit numbers, summed in float32: training in 16 bits loses nothing between features and loss."""
    batch = make((2, 17, 63, 128, 64), torch.float16, device)
    for cosine in ((False, False), (True, True)):
        exact = layer_kl_reference(*(x.double() for x in batch[:4]), batch.target, cosine=cosine)
        for found, right in zip(layer_kl(*batch, cosine=cosine, impl=impl), exact, strict=True):
            torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("which", ["tq", "td", "sq", "sd"])
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
def test_nan_in_is_nan_out(
    which: str, cosine: bool, temperatures: tuple[float, float], memory: str, impl: str, device: torch.device
) -> None:
    batch = make((2, 5, 70, 16, 16), torch.float32, device)
    given = dict(zip(Batch._fields, (x.detach() for x in batch), strict=True))
    given[which][1, 3, 5] = float("nan")
    batch = Batch(**given)
    batch.sq.requires_grad_()
    batch.sd.requires_grad_()
    kl, nll = layer_kl(*batch, *temperatures, cosine=(cosine, cosine), impl=impl)
    assert kl.isnan().tolist() == [False, True]
    assert nll.isnan().tolist() == [False, which[0] == "t"]
    for grad in torch.autograd.grad(kl.sum(), (batch.sq, batch.sd)):
        assert not grad[0].isnan().any()
        assert grad[1].isnan().any()


@pytest.mark.parametrize("which", [0, 1], ids=["teacher", "student"])
def test_a_nan_that_scales_is_nan_out(which: int, memory: str, impl: str, device: torch.device) -> None:
    batch = make((2, 5, 70, 16, 16), torch.float32, device)
    scales = [torch.ones(2, 5, device=device) for _ in range(2)]
    scales[which][1, 3] = float("nan")
    scales[1].requires_grad_()
    kl, nll = layer_kl(*batch, scale=(scales[0], scales[1]), impl=impl)
    assert kl.isnan().tolist() == [False, True]
    assert nll.isnan().tolist() == [False, which == 0]
    for grad in torch.autograd.grad(kl.sum(), (batch.sq, batch.sd, scales[1])):
        assert not grad[0].isnan().any()
        assert grad[1].isnan().any()


@pytest.mark.parametrize("strided", [*Batch._fields, "mask", "grad"])
def test_strided_inputs(strided: str, memory: str, impl: str, device: torch.device) -> None:
    """Every tensor that a kernel reads may be a view: wrong numbers, not an error, are what that would give."""
    batch = make((2, 9, 40, 16, 16), torch.float32, device)
    mask = (torch.rand(9, 40) > 0.4).to(device)
    given = batch._asdict() | {"mask": mask, "grad": torch.randn(2, device=device)}
    expected = results(given, impl)
    x = given[strided].detach()
    given[strided] = torch.stack([x, torch.zeros_like(x)], -1)[..., 0].requires_grad_(given[strided].requires_grad)
    assert not given[strided].is_contiguous()
    # A library multiplies strided tensors in another order.
    slack = 0 if impl == "triton" else 1e-5
    for found, right in zip(results(given, impl), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=slack, atol=slack)


def results(given: dict[str, Tensor], impl: str) -> list[Tensor]:
    batch = Batch(*(given[name] for name in Batch._fields))
    kl, nll = layer_kl(*batch, mask=given["mask"], impl=impl)
    return [kl, nll, *torch.autograd.grad(kl, (batch.sq, batch.sd), given["grad"])]


def test_the_large_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_STORED_SCORES", 0)
    for masked in (False, True):
        batch = make((1, 130, 2100, 16, 16), torch.float16, triton_device)
        mask = (torch.rand(130, 2100) > 0.4).to(triton_device) if masked else None
        check(batch, (1.0, 1.0), mask, "triton")


def test_identical_models_have_no_divergence_and_no_gradient(memory: str, impl: str, device: torch.device) -> None:
    q, d = torch.randn(2, 33, 48, device=device), torch.randn(2, 70, 48, device=device)
    sq, sd = q.clone().requires_grad_(), d.clone().requires_grad_()
    target = torch.arange(33, device=device)
    for temperature in (1.0, 3.0):
        kl, _ = layer_kl(q, d, sq, sd, target, temperature, temperature, impl=impl)
        assert (kl == 0).all()
        for grad in torch.autograd.grad(kl.sum(), (sq, sd)):
            assert (grad == 0).all()


@pytest.mark.parametrize("offset", [300.0, 3000.0])
def test_a_common_offset_of_all_scores_costs_no_precision(
    offset: float, memory: str, impl: str, device: torch.device
) -> None:
    """One more coordinate, equal in all passages, moves every score of a row; only its rounding may show."""
    batch = make((2, 9, 40, 16, 16), torch.float32, device)
    kl, _ = layer_kl(*batch, impl=impl)
    side = offset**0.5
    moved = [torch.nn.functional.pad(vectors.detach(), (0, 16)) for vectors in batch[:4]]
    for vectors in moved:
        vectors[..., 16] = side
    exact, _ = layer_kl_reference(*(vectors.double() for vectors in moved), batch.target)
    found, _ = layer_kl(*moved, batch.target, impl=impl)
    # The scores themselves carry errors of one rounding of the offset; a KL of order one must not carry more.
    assert (found - exact).abs().max().item() < 4 * offset * torch.finfo(torch.float32).eps
    torch.testing.assert_close(kl.double(), exact, rtol=1e-3, atol=1e-3)


def test_rows_of_the_score_gradient_sum_to_zero(memory: str, impl: str, device: torch.device) -> None:
    """With all student passages equal, dq = (sum of dS over passages) d."""
    batch = make((2, 17, 65, 24, 24), torch.float32, device)
    sd = torch.ones_like(batch.sd).requires_grad_()
    kl, _ = layer_kl(batch.tq, batch.td, batch.sq, sd, batch.target, impl=impl)
    dsq, dsd = torch.autograd.grad(kl.sum(), (batch.sq, sd))
    assert dsq.abs().max() < 1e-7
    assert dsd.abs().max() > 1e-4


def test_masked_passages_are_as_if_absent(memory: str, impl: str, device: torch.device) -> None:
    batch = make((2, 9, 40, 16, 24), torch.float32, device)
    batch = batch._replace(target=batch.target % 23)
    mask = torch.ones(9, 40, dtype=torch.bool, device=device)
    mask[:, 23:] = False
    padded = layer_kl(*batch, 1.5, 0.7, mask=mask, impl=impl)
    tight = layer_kl(batch.tq, batch.td[:, :23], batch.sq, batch.sd[:, :23], batch.target, 1.5, 0.7, impl=impl)
    for found, expected in zip(padded, tight, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (dsd,) = torch.autograd.grad(padded[0].sum(), batch.sd)
    assert (dsd[:, 23:] == 0).all()


def test_the_target_is_never_masked(memory: str, impl: str, device: torch.device) -> None:
    batch = make((2, 9, 40, 16, 24), torch.float32, device)
    nothing = torch.zeros(9, 40, dtype=torch.bool, device=device)
    kl, nll = layer_kl(*batch, mask=nothing, impl=impl)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-6)
    torch.testing.assert_close(nll, torch.zeros_like(nll), rtol=0, atol=1e-6)


def test_two_runs_are_bit_equal(memory: str, impl: str, device: torch.device) -> None:
    batch = make((2, 40, 150, 32, 32), torch.float32, device)
    runs = []
    for _ in range(2):
        kl, nll = layer_kl(*batch, impl=impl)
        runs.append((kl, nll, *torch.autograd.grad(kl.sum(), (batch.sq, batch.sd))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_teacher_and_student_of_different_dtypes(impl: str, device: torch.device) -> None:
    batch = make((2, 9, 40, 16, 24), torch.float32, device)
    half = batch._replace(tq=batch.tq.half(), td=batch.td.half())
    whole = batch._replace(tq=half.tq.float(), td=half.td.float())
    for found, expected in zip(layer_kl(*half, impl=impl), layer_kl(*whole, impl=impl), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tiny_float16_gradients_survive(memory: str, triton_device: torch.device) -> None:
    """Thousands of passages share a probability of one: most residuals are far below float16's smallest normal number."""
    batch = make((1, 4, 2000, 16, 16), torch.float16, triton_device)
    check(batch, (1.0, 1.0), None, "triton")


@pytest.mark.parametrize("impl", ["torch"])
def test_gradcheck(memory: str, impl: str) -> None:
    batch = make((2, 3, 7, 8, 5), torch.float64, torch.device("cpu"))
    mask = torch.rand(3, 7) > 0.3
    for function in (layer_kl, layer_kl_reference):
        assert torch.autograd.gradcheck(
            lambda q, d, function=function: function(batch.tq, batch.td, q, d, batch.target, 2.0, 0.5, mask=mask)[0],
            (batch.sq, batch.sd),
        )


def test_opcheck(memory: str, impl: str, device: torch.device) -> None:
    batch = make((2, 3, 7, 8, 16), torch.float32, device)
    mask = (torch.rand(3, 7) > 0.3).to(device)
    operator, scale = torch.ops.lead_ds.layer_kl.default, torch.rand(2, 3, device=device).requires_grad_()
    cosine = (impl == "triton", impl == "triton")  # the torch operator is given unit vectors
    torch.library.opcheck(operator, (*batch, mask, None, None, 2.0, 0.5, *cosine, True, impl))
    if impl == "triton":
        torch.library.opcheck(operator, (*batch, mask, None, scale, 2.0, 0.5, False, False, True, impl))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tq": torch.zeros(2, 3, 9)}, "teacher's queries and passages"),
        ({"sd": torch.zeros(1, 7, 8)}, "student's queries and passages"),
        ({"sd": torch.zeros(2, 6, 8)}, "must agree"),
        ({"target": torch.zeros(4, dtype=torch.long)}, "target must be"),
        ({"mask": torch.ones(7, 3)}, "mask must be"),
        ({"teacher_temperature": 0.0}, "temperatures must be positive"),
        ({"td": torch.zeros(2, 7, 8, requires_grad=True)}, "detach"),
        ({"impl": "fast"}, "unknown impl"),
        ({"scale": (torch.ones(2, 4), None)}, r"row_scale must be \(2, 3\)"),
        ({"scale": (None, torch.ones(2, 3)), "cosine": (False, True)}, "not both"),
        ({"scale": (torch.ones(2, 3, requires_grad=True), None)}, "detach"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = dict(make((2, 3, 7, 8, 8), torch.float32, torch.device("cpu"))._asdict()) | change
    with pytest.raises(ValueError, match=message):
        layer_kl(**given)  # type: ignore[arg-type]


def test_the_public_function_takes_inner_products_and_temperatures() -> None:
    batch = make((2, 4, 12, 8, 6), torch.float32, torch.device("cpu"))
    found = public(*batch, 1.5, 0.7, impl="torch")
    expected = layer_kl_reference(*(x.double() if x.is_floating_point() else x for x in batch), 1.5, 0.7)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)
