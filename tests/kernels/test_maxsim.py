"""maxsim: chunked torch and Triton against the float64 reference."""

import pytest
import torch
from torch import Tensor

from lead_ds.kernels import maxsim
from lead_ds.kernels.maxsim import chunked
from lead_ds.kernels.maxsim.reference import maxsim_reference
from tests.kernels.oracle import assert_as_accurate_as_eager

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Q, P, Lq, Ld, D: ones, packed queries that fill a tile and that do not, queries longer than a tile, widths of one and
# several slices, widths that need padding, tiles of tokens that end inside.
SHAPES = [
    (1, 1, 1, 1, 8),
    (3, 2, 17, 63, 16),
    (5, 3, 32, 64, 24),
    (2, 3, 65, 65, 70),
    (2, 2, 129, 17, 128),
    (1, 4, 63, 129, 136),
]


@pytest.fixture(params=["torch", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(impl: str, request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if impl == "torch" else request.getfixturevalue("triton_device")


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    queries, passages, length_q, length_d, width = shape
    q = torch.randn(queries, length_q, width).to(device, dtype).requires_grad_()
    d = torch.randn(passages, length_d, width).to(device, dtype).requires_grad_()
    return q, d


def masks(q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Holes anywhere, and a passage and a query with nothing left."""
    q_mask, d_mask = torch.rand(q.shape[:2]) > 0.3, torch.rand(d.shape[:2]) > 0.3
    q_mask[0], d_mask[-1] = False, False
    return q_mask.to(q.device), d_mask.to(d.device)


def check(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, impl: str, cosine: bool = False) -> None:
    found = maxsim(q, d, q_mask, d_mask, cosine=cosine, impl=impl)
    weight = torch.randn(found.shape, device=found.device, dtype=torch.float64)
    found_grads = torch.autograd.grad(found, (q, d), weight.to(found.dtype))
    exact_q, exact_d = q.detach().double().requires_grad_(), d.detach().double().requires_grad_()
    exact = maxsim_reference(exact_q, exact_d, q_mask, d_mask, cosine=cosine)
    exact_grads = torch.autograd.grad(exact, (exact_q, exact_d), weight)
    # Eager cosines are taken in float32: float16 holds neither the square of a length nor the guard against 0.
    plain = (q.float(), d.float()) if cosine else (q, d)
    eager = maxsim_reference(*plain, q_mask, d_mask, cosine=cosine)
    eager_grads = torch.autograd.grad(eager, (q, d), weight.to(eager.dtype))
    assert found.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert [grad.dtype for grad in found_grads] == [q.dtype, d.dtype]
    for name, got, near, true in zip(
        ("scores", "dq", "dd"), (found, *found_grads), (eager, *eager_grads), (exact, *exact_grads), strict=True
    ):
        assert_as_accurate_as_eager(got, near, true, q.dtype, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_forward_and_gradients_match_the_reference(
    shape: tuple[int, ...], masked: bool, impl: str, device: torch.device, triton_dtypes: tuple[torch.dtype, ...]
) -> None:
    dtypes = triton_dtypes if impl == "triton" else (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        q, d = make(shape, dtype, device)
        check(q, d, *(masks(q, d) if masked else (None, None)), impl)


@pytest.mark.parametrize("shape", [(3, 2, 17, 63, 16), (2, 3, 65, 65, 70), (2, 2, 129, 17, 128)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_cosines_match_the_reference(
    shape: tuple[int, ...], masked: bool, impl: str, device: torch.device, triton_dtypes: tuple[torch.dtype, ...]
) -> None:
    """Vectors of very different lengths."""
    for dtype in triton_dtypes:
        q, d = make(shape, dtype, device)
        with torch.no_grad():
            q *= torch.logspace(-1, 1, shape[2], device=device)[:, None]
            d *= torch.logspace(1, -1, shape[3], device=device)[:, None]
        check(q, d, *(masks(q, d) if masked else (None, None)), impl, cosine=True)


def test_cosines_of_16_bits_are_as_exact_as_those_of_32(impl: str, device: torch.device) -> None:
    """Nothing is rounded between the inputs and the sum: unit vectors in 16 bits would be off by 1e-3."""
    q, d = make((3, 4, 9, 21, 48), torch.float16, device)
    exact = maxsim_reference(q.double(), d.double(), cosine=True)
    torch.testing.assert_close(maxsim(q, d, cosine=True, impl=impl).double(), exact, rtol=2e-6, atol=2e-6)


def test_a_vector_without_a_length_has_cosine_zero(impl: str, device: torch.device) -> None:
    q, d = (x.detach() for x in make((1, 1, 1, 5, 16), torch.float32, device))
    score = maxsim(q.zero_().requires_grad_(), d, cosine=True, impl=impl)
    assert score.item() == 0
    assert torch.autograd.grad(score.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("which", ["q", "d"])
@pytest.mark.parametrize("grad", [False, True], ids=["scores", "winners"])
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
def test_nan_in_is_nan_out(which: str, grad: bool, cosine: bool, impl: str, device: torch.device) -> None:
    q, d = (x.detach() for x in make((3, 4, 9, 70, 16), torch.float32, device))
    (q if which == "q" else d)[1, 5, 3] = float("nan")
    q.requires_grad_(grad)
    scores = maxsim(q, d, cosine=cosine, impl=impl)
    broken = torch.zeros(3, 4, dtype=torch.bool, device=device)
    broken[1 if which == "q" else slice(None), slice(None) if which == "q" else 1] = True
    assert torch.equal(scores.isnan(), broken)
    if grad:
        (dq,) = torch.autograd.grad(scores.pow(2).sum(), q)
        assert torch.equal(dq.isnan().any(-1).any(-1), broken.any(-1))


def test_the_compiled_maximum_keeps_nan(triton_device: torch.device) -> None:
    """The interpreter has a maximum of its own; here it runs the function that is compiled, element by element."""
    from tests.kernels.row_argmax_kernel import row_argmax_kernel

    x = torch.randn(4, 8, device=triton_device)
    x[1, 0], x[2, 7], x[3, 2], x[3, 5] = float("nan"), float("nan"), 9.0, 9.0
    top, at = torch.empty(4, device=triton_device), torch.empty(4, dtype=torch.int32, device=triton_device)
    row_argmax_kernel[(1,)](x, top, at)
    assert top.isnan().tolist() == [False, True, True, False]
    assert torch.equal(top[[0, 3]], x.amax(1)[[0, 3]])
    assert at[[0, 3]].tolist() == [int(x[0].argmax()), 2]


def test_many_chunks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_SCORES", 300)
    monkeypatch.setattr(chunked, "_SCATTER_ELEMENTS", 500)
    for shape in SHAPES:
        q, d = make(shape, torch.float64, torch.device("cpu"))
        check(q, d, *masks(q, d), "torch")


def test_a_query_of_many_tiles_sums_its_parts(triton_device: torch.device) -> None:
    q, d = make((2, 2, 300, 20, 16), torch.float32, triton_device)
    check(q, d, *masks(q, d), "triton")


def test_padding_changes_nothing(impl: str, device: torch.device) -> None:
    q, d = make((3, 4, 19, 40, 32), torch.float32, device)
    tight = maxsim(q[:, :12], d[:, :23], impl=impl)
    q_mask = (torch.arange(19, device=device) < 12).expand(3, -1)
    d_mask = (torch.arange(40, device=device) < 23).expand(4, -1)
    weight = torch.randn_like(tight)
    expected = torch.autograd.grad(tight, (q, d), weight)
    padded = maxsim(q, d, q_mask.long(), d_mask.to(torch.uint8), impl=impl)
    torch.testing.assert_close(padded, tight, rtol=1e-6, atol=1e-6)
    for found, exact in zip(torch.autograd.grad(padded, (q, d), weight), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_lies_in_the_padding_reaches_nothing(poison: float, impl: str, device: torch.device) -> None:
    q, d = make((3, 4, 9, 21, 16), torch.float32, device)
    q_mask, d_mask = masks(q, d)
    clean = maxsim(q, d, q_mask, d_mask, impl=impl)
    weight = torch.randn_like(clean)
    expected = torch.autograd.grad(clean, (q, d), weight)
    bad_q = q.detach().masked_fill(~q_mask[..., None], poison).requires_grad_()
    bad_d = d.detach().masked_fill(~d_mask[..., None], poison).requires_grad_()
    found = maxsim(bad_q, bad_d, q_mask, d_mask, impl=impl)
    grads = torch.autograd.grad(found, (bad_q, bad_d), weight)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_fully_masked_passages_and_queries_score_zero(impl: str, device: torch.device) -> None:
    q, d = make((3, 4, 9, 21, 16), torch.float32, device)
    q_mask, d_mask = masks(q, d)
    scores = maxsim(q, d, q_mask, d_mask, impl=impl)
    assert (scores[:, -1] == 0).all()
    assert (scores[0] == 0).all()
    dq, dd = torch.autograd.grad(scores.sum(), (q, d))
    assert (dq[0] == 0).all()
    assert (dd[-1] == 0).all()


def test_scores_that_are_all_negative_stay_negative(impl: str, device: torch.device) -> None:
    q = torch.ones(2, 5, 8, device=device)
    d = -torch.ones(3, 70, 8, device=device)
    d[:, 3] = -0.5
    assert (maxsim(q, d, impl=impl) == -0.5 * 8 * 5).all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 8), (2, 0, 4, 5, 8), (2, 3, 0, 5, 8), (2, 3, 4, 0, 8)], ids=str)
def test_empty_dimensions(shape: tuple[int, ...], impl: str, device: torch.device) -> None:
    q, d = make(shape, torch.float32, device)
    scores = maxsim(q, d, impl=impl)
    assert scores.shape == shape[:2]
    assert (scores == 0).all()
    for grad, given in zip(torch.autograd.grad(scores.sum(), (q, d)), (q, d), strict=True):
        assert grad.shape == given.shape
        assert (grad == 0).all()


def test_two_runs_are_bit_equal(impl: str, device: torch.device) -> None:
    q, d = make((4, 6, 20, 70, 48), torch.float32, device)
    runs = []
    for _ in range(2):
        scores = maxsim(q, d, impl=impl)
        runs.append((scores, *torch.autograd.grad(scores.pow(2).sum(), (q, d))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("strided", ["q", "d", "q_mask", "d_mask", "grad"])
def test_strided_inputs(strided: str, impl: str, device: torch.device) -> None:
    """Every tensor that a kernel reads may be a view: wrong numbers, not an error, are what that would give."""
    q, d = make((3, 4, 9, 21, 16), torch.float32, device)
    given = dict(zip(("q", "d", "q_mask", "d_mask"), (q, d, *masks(q, d)), strict=True))
    given["grad"] = torch.randn(3, 4, device=device)
    expected = results(given, impl)
    x = given[strided].detach()
    given[strided] = torch.stack([x, torch.zeros_like(x)], -1)[..., 0].requires_grad_(x.is_floating_point())
    assert not given[strided].is_contiguous()
    # A library multiplies strided tensors in another order.
    slack = 0 if impl == "triton" else 1e-5
    for found, right in zip(results(given, impl), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=slack, atol=slack)


def results(given: dict[str, Tensor], impl: str) -> list[Tensor]:
    q, d = given["q"], given["d"]
    scores = maxsim(q, d, given["q_mask"], given["d_mask"], impl=impl)
    return [scores, *torch.autograd.grad(scores, (q, d), given["grad"].detach())]


def test_positions_past_int16_are_kept(impl: str, device: torch.device) -> None:
    q = torch.ones(1, 2, 8, device=device, requires_grad=True)
    d = torch.zeros(1, 33000, 8, device=device)
    d[0, 32999] = 1.0
    d.requires_grad_()
    _, argmax = torch.ops.lead_ds.maxsim(q, d, None, None, False, True, impl)
    assert argmax.tolist() == [[32999, 32999]]
    if impl == "torch" or d.is_cuda:  # a thousand tiles of tokens take the interpreter several seconds
        _, dd = torch.autograd.grad(maxsim(q, d, impl=impl).sum(), (q, d))
        assert dd[0].sum(dim=-1).nonzero().flatten().tolist() == [32999]


def test_tiny_float16_gradients_survive(triton_device: torch.device) -> None:
    q, d = make((2, 3, 5, 9, 16), torch.float16, triton_device)
    scores = maxsim(q, d, impl="triton")
    weight = torch.rand_like(scores)
    (large,) = torch.autograd.grad(scores, d, weight, retain_graph=True)
    (small,) = torch.autograd.grad(scores, d, weight * 2.0**-12)
    torch.testing.assert_close(small.float() * 2.0**12, large.float(), rtol=2e-2, atol=2e-3)


def test_gradcheck() -> None:
    q, d = make((2, 3, 4, 5, 8), torch.float64, torch.device("cpu"))
    q_mask, d_mask = masks(q, d)
    assert torch.autograd.gradcheck(lambda q, d: maxsim(q, d, q_mask, d_mask), (q, d))
    assert torch.autograd.gradcheck(lambda q, d: maxsim_reference(q, d, q_mask, d_mask), (q, d))


def test_opcheck(impl: str, device: torch.device) -> None:
    q, d = make((2, 3, 4, 5, 8), torch.float32, device)
    q_mask, d_mask = masks(q, d)
    cosine = impl == "triton"  # the torch operator is given unit vectors
    torch.library.opcheck(torch.ops.lead_ds.maxsim.default, (q, d, q_mask, d_mask, cosine, True, impl))
    torch.library.opcheck(torch.ops.lead_ds.maxsim.default, (q.detach(), d.detach(), None, None, False, False, impl))


def test_only_what_is_asked_is_saved() -> None:
    q, d = make((2, 3, 4, 5, 8), torch.float32, torch.device("cpu"))
    _, argmax = torch.ops.lead_ds.maxsim(q, d, None, None, False, False, "torch")
    assert argmax.numel() == 0
    with torch.no_grad():
        assert not maxsim(q, d).requires_grad


def test_wider_dtype_of_the_two_is_used() -> None:
    q, d = torch.randn(2, 3, 8), torch.randn(2, 4, 8).to(torch.bfloat16)
    torch.testing.assert_close(maxsim(q, d), maxsim(q, d.float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, "q and d must be"),
        ({"d": torch.zeros(2, 3, 9)}, "q and d must be"),
        ({"q_mask": torch.ones(2, 5)}, "q_mask must be"),
        ({"d_mask": torch.ones(3, 3)}, "d_mask must be"),
        ({"impl": "cuda"}, "unknown impl"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"q": torch.zeros(2, 3, 8), "d": torch.zeros(2, 3, 8)} | change
    with pytest.raises(ValueError, match=message):
        maxsim(**given)  # type: ignore[arg-type]


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        maxsim(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        maxsim(torch.zeros(1, 1, 8).double(), torch.zeros(1, 1, 8).double(), impl="triton")
