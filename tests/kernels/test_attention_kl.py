"""attention_kl against its float64 reference: chunked torch on the CPU, Triton in the interpreter or on a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lead_ds.kernels.attention_kl import chunked
from lead_ds.kernels.attention_kl.op import attention_kl
from lead_ds.kernels.attention_kl.reference import attention_log_probs
from tests.kernels.references import attention_kl_reference

# name: B, teacher heads, their key heads, student heads, their key heads, L, dt, ds, arguments
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, dict[str, Any]]] = {
    "one token": (2, 2, 2, 2, 2, 1, 8, 16, {}),
    "17": (2, 2, 2, 2, 2, 17, 8, 16, {}),
    "63 causal": (1, 2, 2, 2, 2, 63, 16, 8, {"causal": True}),
    "64 even": (1, 2, 2, 2, 2, 64, 16, 16, {}),
    "65 grouped": (2, 4, 2, 4, 1, 65, 16, 24, {"temperature": 2.0}),
    "129 band": (1, 2, 2, 2, 2, 129, 16, 16, {"band": 20}),
    "129 causal band grouped": (1, 2, 1, 2, 2, 129, 16, 16, {"band": 30, "causal": True}),
    "wide": (1, 2, 1, 2, 2, 17, 200, 256, {}),
    "relation": (2, 4, 2, 8, 8, 33, 16, 4, {"relation_heads": 2, "teacher_scale": 0.3, "student_scale": 0.2}),
}
MASKS = ("none", "right", "left", "holes")
TIGHT = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def tensors(name: str, dtype: torch.dtype, device: torch.device | str = "cpu", offset: float = 0.0) -> list[Tensor]:
    batch, t_heads, t_keys, s_heads, s_keys, length, t_width, s_width, _ = SHAPES[name]
    tq, tk = torch.randn(batch, t_heads, length, t_width), torch.randn(batch, t_keys, length, t_width)
    sq, sk = torch.randn(batch, s_heads, length, s_width), torch.randn(batch, s_keys, length, s_width)
    if offset:
        # A constant added to every logit of a row changes no probability.
        tq[..., 0], tk[..., 0], sq[..., 0], sk[..., 0] = offset, 1.0, -offset, 1.0
    return [x.to(dtype).to(device) for x in (tq, tk, sq, sk)]


def mask_of(kind: str, batch: int, length: int) -> Tensor | None:
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "none":
        return None
    if kind == "right":
        mask[0, (length + 1) // 2 :] = 0
        mask[-1, max(1, length - 3) :] = 0
    elif kind == "left":
        mask[-1, : length // 3] = 0
    else:
        mask = (torch.rand(batch, length) > 0.4).long()
        mask[0] = 0
        mask[-1, -1] = 1
    return mask


def poison(inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """What is padding may hold anything."""
    if mask is None:
        return inputs
    hidden = (mask == 0).to(inputs[0].device)[:, None, :, None]
    return [x.masked_fill(hidden, float("nan")) for x in inputs]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is filled with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def evaluate(
    function: Any, inputs: list[Tensor], mask: Tensor | None, loss_scale: float = 3.0, **arguments: Any
) -> list[Tensor]:
    """The value and its gradients, times a scale, to the student's q and k, as float64 on the CPU."""
    tq, tk, sq, sk = inputs
    sq, sk = sq.detach().requires_grad_(), sk.detach().requires_grad_()
    value = function(tq, tk, sq, sk, None if mask is None else mask.to(sq.device), **arguments)
    gradients = torch.autograd.grad(value * loss_scale, (sq, sk))
    return [x.detach().double().cpu() for x in (value, *gradients)]


def assert_as_good_as_eager(inputs: list[Tensor], mask: Tensor | None, arguments: dict[str, Any], **how: Any) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus a small absolute one."""
    dtype = inputs[0].dtype
    exact = evaluate(attention_kl_reference, [x.double() for x in inputs], mask, **arguments)
    eager = evaluate(attention_kl_reference, inputs, mask, **arguments)
    with poisoned_memory():
        found = evaluate(attention_kl, poison(inputs, mask), mask, **arguments, **how)
    for name, x, plain, truth in zip(("kl", "dq", "dk"), found, eager, exact, strict=True):
        assert torch.isfinite(x).all(), name
        allowed = 2 * (plain - truth).abs().max() + TIGHT[dtype] * max(1e-3, truth.abs().max())
        assert (x - truth).abs().max() <= allowed, (name, (x - truth).abs().max(), allowed)


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("name", ["17", "63 causal", "65 grouped", "129 causal band grouped"])
def test_reference_gradient_is_that_of_its_value(name: str, head_mean: bool) -> None:
    batch, t_heads, t_keys, s_heads, s_keys, _, _, _, arguments = SHAPES[name]
    length, width = 5, 3
    teacher = [torch.randn(batch, heads, length, width, dtype=torch.float64) for heads in (t_heads, t_keys)]
    student = [torch.randn(batch, heads, length, width, dtype=torch.float64) for heads in (s_heads, s_keys)]
    mask = mask_of("holes", batch, length)
    arguments = arguments | ({"band": 2} if "band" in arguments else {})

    def value(sq: Tensor, sk: Tensor) -> Tensor:
        return attention_kl_reference(*teacher, sq, sk, mask, head_mean=head_mean, **arguments)

    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in student])


def test_meaning_by_hand() -> None:
    """One head, two tokens, logits given: KL(teacher || student) in nats, averaged over real rows."""
    tq = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
    tk = torch.tensor([[[[2.0], [0.0]]]], dtype=torch.float64)
    sq, sk = torch.zeros_like(tq), torch.zeros_like(tk)
    p = torch.tensor([2.0, 0.0], dtype=torch.float64).softmax(0)
    first = (p * (p / 0.5).log()).sum()
    kl = attention_kl(tq, tk, sq, sk)
    torch.testing.assert_close(kl, (first + 0.0) / 2)
    alone = attention_kl(tq, tk, sq, sk, torch.tensor([[1, 0]]))
    assert alone == 0  # a row that sees one key only


@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_torch_matches_the_reference(name: str, mask: str, small_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small_chunks:
        monkeypatch.setattr(chunked, "_CPU_CHUNK", 700)
    batch, length, arguments = SHAPES[name][0], SHAPES[name][5], SHAPES[name][8]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert_as_good_as_eager(tensors(name, dtype), mask_of(mask, batch, length), arguments, impl="torch")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_torch_head_mean_matches_the_reference(name: str, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CPU_CHUNK", 2000)
    batch, length, arguments = SHAPES[name][0], SHAPES[name][5], SHAPES[name][8]
    arguments = {key: value for key, value in arguments.items() if key != "relation_heads"} | {"head_mean": True}
    assert_as_good_as_eager(tensors(name, torch.float64), mask_of(mask, batch, length), arguments)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_triton_matches_the_reference(
    name: str, mask: str, triton_device: torch.device, triton_dtypes: tuple[torch.dtype, ...]
) -> None:
    batch, length, arguments = SHAPES[name][0], SHAPES[name][5], SHAPES[name][8]
    hidden = mask_of(mask, batch, length)
    for dtype in triton_dtypes:
        inputs = tensors(name, dtype, triton_device)
        assert_as_good_as_eager(inputs, hidden, arguments, impl="triton", atomic=mask == "holes")


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_triton_adds_the_same_gradient_with_atomics(mask: str, triton_device: torch.device) -> None:
    name = "129 causal band grouped"
    hidden = mask_of(mask, SHAPES[name][0], SHAPES[name][5])
    assert_as_good_as_eager(
        tensors(name, torch.float32, triton_device), hidden, SHAPES[name][8], impl="triton", atomic=True
    )


def implementations() -> list[Any]:
    return [pytest.param("torch", id="torch"), pytest.param("triton", id="triton")]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the implementation under test runs."""
    if request.node.callspec.params["impl"] == "triton":
        return request.getfixturevalue("triton_device")
    return torch.device("cpu")


# The interpreter tells of overflow in rows of hidden keys, which the kernel computes and does not store.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("impl", implementations())
def test_large_offsets_cost_no_digits(impl: str, device: torch.device) -> None:
    name = "63 causal"
    for offset in (300.0, 3000.0):
        inputs = tensors(name, torch.float32, device, offset=offset)
        arguments: dict[str, Any] = {"teacher_scale": 1.0, "student_scale": 1.0}
        exact = evaluate(attention_kl_reference, [x.double() for x in inputs], None, **arguments)
        found = evaluate(attention_kl, inputs, None, **arguments, impl=impl)
        # Rounding of the logits themselves averages out; an uncentred sum is off by 1e-4 at 300 and 1e-3 at 3000.
        assert (found[0] - exact[0]).abs() < 1e-5 * max(1.0, float(exact[0]))
        for x, truth in zip(found[1:], exact[1:], strict=True):
            # These inputs' first coordinate is the offset, and so is its part of the gradient.
            assert (x - truth)[..., 1:].norm() < 1e-4 * truth[..., 1:].norm() * max(1.0, offset / 300)


@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("mask", MASKS)
def test_identical_models_give_exactly_zero(impl: str, mask: str, device: torch.device) -> None:
    q, k = torch.randn(2, 2, 65, 16, device=device) * 4, torch.randn(2, 1, 65, 16, device=device)
    value, dq, dk = evaluate(attention_kl, [q, k, q, k], mask_of(mask, 2, 65), impl=impl)
    assert value == 0
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("impl", implementations())
def test_nothing_real_gives_zero(impl: str, device: torch.device) -> None:
    inputs = tensors("17", torch.float32, device)
    mask = torch.zeros(2, 17)
    for result in evaluate(attention_kl, poison(inputs, mask), mask, impl=impl):
        assert not result.any()
    empty = [x[:0] for x in inputs]
    assert evaluate(attention_kl, empty, None, impl=impl)[0] == 0
    assert evaluate(attention_kl, [x[:, :, :0] for x in inputs], None, impl=impl)[0] == 0


@pytest.mark.parametrize("impl", implementations())
def test_padding_changes_nothing(impl: str, device: torch.device) -> None:
    inputs = tensors("17", torch.float32, device)
    short = evaluate(attention_kl, inputs, None, impl=impl)
    padded = [torch.nn.functional.pad(x, (0, 0, 5, 60), value=float("nan")) for x in inputs]
    mask = torch.zeros(2, 82)
    mask[:, 5:22] = 1
    long = evaluate(attention_kl, padded, mask, impl=impl)
    torch.testing.assert_close(long[0], short[0], atol=1e-7, rtol=1e-6)
    for a, b in zip(long[1:], short[1:], strict=True):
        torch.testing.assert_close(a[:, :, 5:22], b, atol=1e-7, rtol=1e-5)
        assert not a[:, :, :5].any()
        assert not a[:, :, 22:].any()


@pytest.mark.parametrize("impl", implementations())
def test_rows_of_the_logit_gradient_sum_to_zero(impl: str, device: torch.device) -> None:
    """dQ = dS K: with one coordinate of K held at 1, that coordinate of dQ is the sum of a row of dS."""
    inputs = tensors("65 grouped", torch.float32, device)
    inputs[3][..., 0] = 1.0
    _, dq, dk = evaluate(attention_kl, inputs, None, impl=impl)
    assert dq[..., 0].abs().max() < 1e-6 * dq.abs().max() + 1e-8
    assert dq.abs().max() > 1e-5
    assert dk.abs().max() > 1e-5


@pytest.mark.parametrize("impl", implementations())
def test_small_divergences_keep_their_gradient(impl: str, device: torch.device) -> None:
    """Student minus teacher probability is formed before rounding: a KL of 1e-6 still has the right direction."""
    inputs = tensors("65 grouped", torch.float16, device)
    teacher = [inputs[0], inputs[1]]
    student = [teacher[0] + 2e-3 * torch.randn_like(teacher[0]), teacher[1].clone()]
    scale = 2.0**14  # what keeps such gradients in float16's range
    _, dq, _ = evaluate(attention_kl, [*teacher, *student], None, scale, impl=impl)
    _, exact, _ = evaluate(attention_kl_reference, [x.double() for x in (*teacher, *student)], None, scale)
    kl = attention_kl_reference(*[x.double() for x in (*teacher, *student)])
    assert kl < 1e-5
    assert (dq - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("impl", implementations())
def test_layer_pairs_of_different_shapes_share_a_call(impl: str, device: torch.device) -> None:
    pairs = [tensors("17", torch.float32, device) for _ in range(3)]
    pairs[1] = [
        torch.randn(2, 4, 17, 16, device=device),
        torch.randn(2, 2, 17, 16, device=device),
        torch.randn(2, 4, 17, 12, device=device).transpose(1, 2).contiguous().transpose(1, 2),
        torch.randn(2, 4, 17, 12, device=device),
    ]
    for pair in pairs:
        pair[2].requires_grad_()
        pair[3].requires_grad_()
    mask = mask_of("right", 2, 17).to(device)  # type: ignore[union-attr]
    bands, scales = [None, 5, None], [0.5, 0.2, 0.5]
    columns = [list(column) for column in zip(*pairs, strict=True)]
    values = attention_kl(*columns, mask, per_pair=True, band=bands, teacher_scale=scales, impl=impl)
    students = [pair[i] for pair in pairs for i in (2, 3)]
    weights = torch.tensor([1.0, 0.5, 2.0], device=device)
    gradients = torch.autograd.grad((values * weights).sum(), students)
    for k, pair in enumerate(pairs):
        alone = attention_kl_reference(*pair, mask, band=bands[k], teacher_scale=scales[k])
        torch.testing.assert_close(values[k], alone, atol=1e-6, rtol=1e-5)
        expected = torch.autograd.grad(alone * weights[k], (pair[2], pair[3]))
        torch.testing.assert_close(gradients[2 * k : 2 * k + 2], expected, atol=1e-6, rtol=1e-4)
    mean = attention_kl(*columns, mask, band=bands, teacher_scale=scales, impl=impl)
    torch.testing.assert_close(mean, values.mean())


@pytest.mark.parametrize("impl", implementations())
def test_only_what_is_trained_gets_a_gradient(impl: str, device: torch.device) -> None:
    tq, tk, sq, sk = tensors("17", torch.float32, device)
    value = attention_kl(tq, tk, sq.requires_grad_(), sk, impl=impl)
    value.backward()
    assert sq.grad is not None
    assert sk.grad is None
    with torch.no_grad():
        assert not attention_kl(tq, tk, sq, sk, impl=impl).requires_grad
    with pytest.raises(ValueError, match="detach"):
        attention_kl(tq.requires_grad_(), tk, sq, sk, impl=impl)


def test_relation_heads_of_a_projection_are_a_view() -> None:
    from lead_ds.kernels.attention_kl.inputs import relation_split

    projected = torch.randn(2, 9, 48)
    heads = projected.view(2, 9, 4, 12).transpose(1, 2)
    assert relation_split(heads, 4, 6).data_ptr() == projected.data_ptr()
    torch.testing.assert_close(relation_split(heads, 4, 6), projected.view(2, 9, 6, 8).transpose(1, 2))


def test_band_and_causal_hide_what_they_say() -> None:
    q, k = torch.randn(1, 1, 9, 4, dtype=torch.float64), torch.randn(1, 1, 9, 4, dtype=torch.float64)
    other = [torch.randn_like(q), torch.randn_like(k)]
    row, key = torch.arange(9)[:, None], torch.arange(9)[None, :]
    for arguments, visible in (
        ({"band": 2}, (row - key).abs() <= 2),
        ({"causal": True}, key <= row),
        ({"band": 0}, row == key),
    ):
        teacher, student = attention_log_probs(q, k, 0.5, visible), attention_log_probs(*other, 0.5, visible)
        by_hand = torch.where(visible, teacher.exp() * (teacher - student), 0.0).sum(-1).mean()
        torch.testing.assert_close(attention_kl(q, k, *other, **arguments), by_hand)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"band": -1}, "band"),
        ({"relation_heads": 7}, "does not divide"),
        ({"teacher_scale": [1.0, 2.0]}, "2 values"),
        ({"impl": "cuda"}, "unknown impl"),
        ({"mask": torch.ones(2, 16)}, "mask must be"),
        ({"sq": torch.randn(2, 3, 17, 8), "sk": torch.randn(2, 3, 17, 8)}, "relation_heads=R"),
        ({"sq": torch.randn(2, 2, 18, 8), "sk": torch.randn(2, 2, 18, 8)}, "grouped_attention_kl"),
        ({"sk": torch.randn(2, 2, 17, 9)}, "head dimensions"),
        ({"tq": [], "tk": [], "sq": [], "sk": []}, "at least one pair"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], what: str) -> None:
    arguments = {"tq": (2, 2, 17, 8), "tk": (2, 2, 17, 8), "sq": (2, 2, 17, 8), "sk": (2, 2, 17, 8)}
    given: dict[str, Any] = {name: torch.randn(*shape) for name, shape in arguments.items()}
    with pytest.raises(ValueError, match=what):
        attention_kl(**(given | change))


def test_triton_refuses_what_it_has_no_kernel_for(triton_device: torch.device) -> None:
    wide = [torch.randn(1, 1, 4, 258, device=triton_device) for _ in range(4)]
    with pytest.raises(ValueError, match="wider than 256"):
        attention_kl(*wide, impl="triton")
    with pytest.raises(ValueError, match="wider than 256"):
        attention_kl(*wide, impl="triton", head_mean=True)


_MEMORY = """
import sys, torch
from lead_ds.kernels.attention_kl.op import attention_kl
from tests.kernels.references import attention_kl_reference
torch.set_num_threads(1)
def peak():  # not ru_maxrss, which a process takes over from the one that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def run(function, length):
    x = [torch.randn(2, 12, length, 64) for _ in range(4)]
    function(*x[:2], x[2].requires_grad_(), x[3].requires_grad_()).backward()
function = {"torch": attention_kl, "eager": attention_kl_reference}[sys.argv[1]]
run(function, 16)
torch.manual_seed(0)
inputs = [torch.randn(2, 12, 768, 64) for _ in range(4)]
before = peak()
function(*inputs[:2], inputs[2].requires_grad_(), inputs[3].requires_grad_()).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_torch_needs_under_a_tenth_of_the_memory_of_full_maps() -> None:
    """Peak of a process over its inputs, forward and backward (gradients included): B2 H12 L768 d64."""

    def peak(which: str) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", _MEMORY, which]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)

    assert peak("torch") < peak("eager") / 10
