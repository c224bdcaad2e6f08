"""Layer-relevance KL as a torch operator and as the public function."""

import torch
from torch import Tensor

from lead_ds.kernels.dispatch import resolve
from lead_ds.kernels.layer_kl import chunked
from lead_ds.kernels.layer_kl.regime import saved_dtype, saved_shapes

_LIBRARY = torch.library.Library("lead_ds", "FRAGMENT")
_INPUTS = (
    "Tensor tq, Tensor td, Tensor sq, Tensor sd, Tensor target, Tensor? mask,"
    " float teacher_temperature, float student_temperature"
)
_LIBRARY.define(f"layer_kl({_INPUTS}, bool differentiable, str impl) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(f"layer_kl_backward(Tensor grad, {_INPUTS}, Tensor maps, Tensor lse, str impl) -> (Tensor, Tensor)")


def layer_kl(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """KL between a teacher's and a student's relevance distributions over a batch's passages, for K layer pairs at
    once.

    Teacher queries tq [K, Q, Dt] and passages td [K, P, Dt], student sq [K, Q, Ds] and sd [K, P, Ds], target [Q] int64
    (the position of each query's positive) -> (kl [K], teacher_nll [K]), float32 (float64 for float64 inputs). A score
    is an inner product. kl is KL(teacher || student) at the two temperatures, in nats, summed over passages and
    averaged over queries; teacher_nll is the teacher's own negative log-likelihood of the target at temperature 1 and
    carries no gradient. `mask` [Q, P] bool leaves out of both of a query's distributions the passages where it is False
    (in-batch duplicates of its positive); a target is never left out. Differentiable, deterministically, in sq and sd.

    Raises ValueError for shapes that do not fit together, a temperature that is not positive, a teacher that requires a
    gradient, or an `impl` that cannot run here. LEAD, https://arxiv.org/abs/2212.05225.
    """
    _check(tq, td, sq, sd, target, mask, teacher_temperature, student_temperature)
    tq, td = _same_dtype(tq, td)
    sq, sd = _same_dtype(sq, sd)
    chosen = resolve(impl, tq, td, sq, sd, kernel="layer_kl")
    differentiable = torch.is_grad_enabled() and (sq.requires_grad or sd.requires_grad)
    mask = None if mask is None else mask.to(torch.bool)
    temperatures = float(teacher_temperature), float(student_temperature)
    kl, nll, _, _ = torch.ops.lead_ds.layer_kl(tq, td, sq, sd, target, mask, *temperatures, differentiable, chosen)
    return kl, nll.detach()


def _check(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
) -> None:
    for side, q, d in (("teacher", tq, td), ("student", sq, sd)):
        if q.dim() != 3 or d.dim() != 3 or q.shape[0] != d.shape[0] or q.shape[2] != d.shape[2]:
            raise ValueError(
                f"layer_kl: the {side}'s queries and passages must be [K, Q, D] and [K, P, D],"
                f" not {tuple(q.shape)} and {tuple(d.shape)}"
            )
    if tq.shape[:2] != sq.shape[:2] or td.shape[1] != sd.shape[1]:
        raise ValueError(
            f"layer_kl: teacher {tuple(tq.shape)}, {tuple(td.shape)} and student {tuple(sq.shape)}, {tuple(sd.shape)}"
            " must agree in layers, queries and passages"
        )
    if target.shape != tq.shape[1:2]:
        raise ValueError(f"layer_kl: target must be [{tq.shape[1]}], not {tuple(target.shape)}")
    if mask is not None and mask.shape != (tq.shape[1], td.shape[1]):
        raise ValueError(f"layer_kl: mask must be {(tq.shape[1], td.shape[1])}, not {tuple(mask.shape)}")
    if not (teacher_temperature > 0 and student_temperature > 0):
        raise ValueError(f"layer_kl: temperatures must be positive, not {teacher_temperature}, {student_temperature}")
    if tq.requires_grad or td.requires_grad:
        raise ValueError("layer_kl: the teacher is a constant; detach tq and td")


def _same_dtype(q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype == d.dtype:
        return q, d
    dtype = torch.promote_types(q.dtype, d.dtype)
    return q.to(dtype), d.to(dtype)


def _forward(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    differentiable: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = tq, td, sq, sd, target, mask, teacher_temperature, student_temperature, differentiable
    if impl == "triton":
        from lead_ds.kernels.layer_kl import triton_kernel

        return triton_kernel.forward(*arguments)
    return chunked.forward(*arguments)


def _backward(
    grad: Tensor,
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    maps: Tensor,
    lse: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    arguments = grad, tq, td, sq, sd, target, mask, teacher_temperature, student_temperature, maps, lse
    if impl == "triton":
        from lead_ds.kernels.layer_kl import triton_kernel

        return triton_kernel.backward(*arguments)
    return chunked.backward(*arguments)


_LIBRARY.impl("layer_kl", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_kl_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lead_ds::layer_kl")
def _fake_forward(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    differentiable: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers, queries, _ = tq.shape
    dtype = saved_dtype(tq.dtype, sq.dtype)
    shapes = ((layers,), (layers,), *saved_shapes(impl, layers, queries, td.shape[1], differentiable))
    kl, nll, maps, lse = (tq.new_empty(shape, dtype=dtype) for shape in shapes)
    return kl, nll, maps, lse


@torch.library.register_fake("lead_ds::layer_kl_backward")
def _fake_backward(
    grad: Tensor,
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    maps: Tensor,
    lse: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return sq.new_empty(sq.shape), sd.new_empty(sd.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    tq, td, sq, sd, target, mask, teacher_temperature, student_temperature, _, impl = inputs
    ctx.save_for_backward(tq, td, sq, sd, target, mask, output[2], output[3])
    ctx.rest = teacher_temperature, student_temperature, impl  # type: ignore[attr-defined]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple:
    tq, td, sq, sd, target, mask, maps, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    teacher_temperature, student_temperature, impl = ctx.rest  # type: ignore[attr-defined]
    dsq, dsd = torch.ops.lead_ds.layer_kl_backward(
        grad, tq, td, sq, sd, target, mask, teacher_temperature, student_temperature, maps, lse, impl
    )
    return None, None, dsq, dsd, None, None, None, None, None, None


torch.library.register_autograd("lead_ds::layer_kl", _differentiate, setup_context=_setup_context, lib=_LIBRARY)
