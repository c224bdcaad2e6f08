"""Layer-relevance KL as a torch operator and as the public functions."""

from typing import Any

import torch
from torch import Tensor

from lead_ds.kernels.dispatch import resolve, unless_refused, with_fallback
from lead_ds.kernels.layer_kl import chunked
from lead_ds.kernels.layer_kl.inputs import Factors, Problem, checked, saved_shapes

_LIBRARY = torch.library.Library("lead_ds", "FRAGMENT")
_INPUTS = (
    "Tensor tq, Tensor td, Tensor sq, Tensor sd, Tensor target, Tensor? mask, Tensor? teacher_scale, Tensor? student_scale,"
    " float teacher_temperature, float student_temperature, bool teacher_cosine, bool student_cosine"
)
_LIBRARY.define(f"layer_kl({_INPUTS}, bool differentiable, str impl) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"layer_kl_backward(Tensor grad, {_INPUTS}, Tensor saved, Tensor too, str impl) -> (Tensor, Tensor, Tensor)"
)


def layer_kl(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`factors_kl` of inner products: tq [K, Q, Dt], td [K, P, Dt], sq [K, Q, Ds], sd [K, P, Ds], target [Q] int64.

    >>> q, d = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
    >>> layer_kl(q, d, q, d, torch.tensor([0, 1]))[0].item()
    0.0
    """
    return factors_kl(Factors(tq, td, teacher_temperature), Factors(sq, sd, student_temperature), target, impl=impl)


def factors_kl(
    teacher: Factors, student: Factors, target: Tensor, *, mask: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """KL between a teacher's and a student's relevance distributions over a batch's passages, for K layer pairs at
    once.

    Teacher and student: queries [K, Q, D] and passages [K, P, D] (each model its own D); target: [Q] int64, the
    position of each query's positive. Returns (kl [K], teacher_nll [K]), float32 (float64 for float64 inputs). A score
    is an inner product, times its query's `row_scale` where there is one; or a cosine, whose lengths are taken in
    float32. 16-bit products are summed in float32. The
    first is KL(teacher || student) at the two temperatures, in nats, summed over passages and averaged over queries.
    The second is the teacher's own negative log-likelihood of the target at temperature 1; it carries no gradient.
    `mask` [Q, P] bool leaves out of both of a query's distributions the passages where it is False (in-batch duplicates
    of its positive); a target is never left out. Differentiable, deterministically, in the student's tensors.

    Raises ValueError for shapes that do not fit together, a temperature that is not positive, a teacher that requires a
    gradient, or an `impl` that cannot run here. LEAD, https://arxiv.org/abs/2212.05225.

    >>> one = Factors(torch.ones(1, 2, 4), torch.ones(1, 3, 4))
    >>> factors_kl(one, one, torch.tensor([0, 1]))[0].item()
    0.0
    """
    problem = checked(teacher, student, target, mask)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in student.tensors)

    def run(chosen: str) -> tuple[Tensor, Tensor]:
        given = problem.plain() if chosen == "torch" else problem
        kl, nll, _, _ = torch.ops.lead_ds.layer_kl(*given.flat(), differentiable, chosen)
        return kl, nll.detach()

    tensors = (problem.teacher.q, problem.teacher.d, problem.student.q, problem.student.d)
    return with_fallback(run, impl, resolve(impl, *tensors, kernel="layer_kl"), kernel="layer_kl")


def _implementation(impl: str) -> Any:
    if impl == "torch":
        return chunked
    from lead_ds.kernels.layer_kl import triton_kernel

    return triton_kernel


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, differentiable, impl = arguments
    return _implementation(impl).forward(Problem.of(*inputs), differentiable)


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, saved, too, impl = arguments
    return _implementation(impl).backward(grad, Problem.of(*inputs), saved, too)


_LIBRARY.impl("layer_kl", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("layer_kl_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lead_ds::layer_kl")
def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, differentiable, impl = arguments
    problem = Problem.of(*inputs)
    layers = (problem.shape[0],)
    shapes = (layers, layers, *saved_shapes(problem, impl, differentiable))
    kl, nll, saved, too = (problem.student.q.new_empty(shape, dtype=problem.dtype) for shape in shapes)
    return kl, nll, saved, too


@torch.library.register_fake("lead_ds::layer_kl_backward")
def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(*arguments[:-3])
    student = problem.student
    scale = student.q.new_empty(0 if student.row_scale is None else student.row_scale.shape, dtype=problem.dtype)
    return student.q.new_empty(student.q.shape), student.d.new_empty(student.d.shape), scale


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:8], output[2], output[3])
    ctx.rest = inputs[8:12], inputs[13]  # type: ignore[attr-defined]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None) -> tuple:
    *tensors, saved, too = ctx.saved_tensors  # type: ignore[attr-defined]
    numbers, impl = ctx.rest  # type: ignore[attr-defined]

    def kernel() -> tuple[Tensor, ...]:
        return torch.ops.lead_ds.layer_kl_backward(grad, *tensors, *numbers, saved, too, impl)

    def instead() -> tuple[Tensor, ...]:
        problem = Problem.of(*tensors, *numbers)
        with torch.enable_grad():
            q, d, *scale = (x.detach().requires_grad_() for x in problem.student.tensors)
            student = problem.student._replace(q=q, d=d, row_scale=scale[0] if scale else None)
            kl, _ = factors_kl(problem.teacher, student, problem.target, mask=problem.mask, impl="torch")
            return torch.autograd.grad(kl, student.tensors, grad)

    dsq, dsd, *scale = unless_refused(kernel, instead, impl, kernel="layer_kl")
    return None, None, dsq, dsd, *(None,) * 3, scale[0] if ctx.needs_input_grad[7] else None, *(None,) * 6  # type: ignore[attr-defined]


torch.library.register_autograd("lead_ds::layer_kl", _differentiate, setup_context=_setup_context, lib=_LIBRARY)
