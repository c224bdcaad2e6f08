"""MaxSim as a torch operator and as the public function."""

import torch
from torch import Tensor

from lead_ds.kernels.dispatch import accumulation_dtype, resolve, unless_refused, with_fallback
from lead_ds.kernels.maxsim import chunked
from lead_ds.kernels.vectors import unit

_LIBRARY = torch.library.Library("lead_ds", "FRAGMENT")
_LIBRARY.define(
    "maxsim(Tensor q, Tensor d, Tensor? q_mask, Tensor? d_mask, bool cosine, bool save_argmax, str impl)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "maxsim_backward(Tensor grad, Tensor q, Tensor d, Tensor? q_mask, Tensor? d_mask, Tensor argmax, bool cosine, str impl)"
    " -> (Tensor, Tensor)"
)


def maxsim(
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    cosine: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Late-interaction scores: for every query and passage, the sum over query tokens of the best passage token's
    product.

    q: [Q, Lq, D], d: [P, Ld, D], float (the wider dtype of the two is used); masks: [Q, Lq] and [P, Ld] with 1 = real.
    Returns [Q, P], float32 (float64 for float64 inputs). Masked query tokens add 0, masked passage tokens never win,
    and a fully masked passage scores 0; a score that NaN takes part in is NaN. `cosine` divides products by the
    vectors' lengths, which are computed in float32 and have their share of the gradient. Differentiable in q and d,
    deterministically; the [Q, P, Lq, Ld] similarities are never held, only the position of each winner (2 bytes).

    Raises ValueError for shapes that do not fit together or an `impl` that cannot run here.
    ColBERT, https://arxiv.org/abs/2004.12832, eq. 3.

    >>> maxsim(torch.ones(1, 2, 4), torch.ones(1, 3, 4)).item()
    8.0
    """
    _check(q, d, q_mask, d_mask)
    if q.dtype != d.dtype:
        dtype = torch.promote_types(q.dtype, d.dtype)
        q, d = q.to(dtype), d.to(dtype)
    save_argmax = torch.is_grad_enabled() and (q.requires_grad or d.requires_grad)
    masks = [None if mask is None else mask.to(torch.bool) for mask in (q_mask, d_mask)]

    def run(chosen: str) -> Tensor:
        whole = cosine and chosen == "torch"
        vectors = (unit(q), unit(d)) if whole else (q, d)
        scores, _ = torch.ops.lead_ds.maxsim(*vectors, *masks, cosine and not whole, save_argmax, chosen)
        return scores

    return with_fallback(run, impl, resolve(impl, q, d, kernel="maxsim"), kernel="maxsim")


def _check(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None) -> None:
    if q.dim() != 3 or d.dim() != 3 or q.shape[2] != d.shape[2]:
        raise ValueError(
            f"maxsim: q and d must be [Q, Lq, D] and [P, Ld, D], not {tuple(q.shape)} and {tuple(d.shape)}"
        )
    for name, mask, tokens in (("q_mask", q_mask, q), ("d_mask", d_mask, d)):
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(f"maxsim: {name} must be {tuple(tokens.shape[:2])}, not {tuple(mask.shape)}")


def _forward(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, cosine: bool, save_argmax: bool, impl: str
) -> tuple[Tensor, Tensor]:
    if impl != "torch":
        from lead_ds.kernels.maxsim import triton_kernel

        return triton_kernel.forward(q, d, q_mask, d_mask, cosine, save_argmax)
    return chunked.forward(q, d, q_mask, d_mask, save_argmax)


def _backward(
    grad: Tensor,
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    argmax: Tensor,
    cosine: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl != "torch":
        from lead_ds.kernels.maxsim import triton_kernel

        return triton_kernel.backward(grad, q, d, q_mask, d_mask, argmax, cosine)
    return chunked.backward(grad, q, d, q_mask, d_mask, argmax)


_LIBRARY.impl("maxsim", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("maxsim_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("lead_ds::maxsim")
def _fake_forward(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, cosine: bool, save_argmax: bool, impl: str
) -> tuple[Tensor, Tensor]:
    scores = q.new_empty((q.shape[0], d.shape[0]), dtype=accumulation_dtype(q.dtype))
    shape = (d.shape[0], q.shape[0] * q.shape[1]) if save_argmax else (0,)
    return scores, q.new_empty(shape, dtype=chunked.argmax_dtype(d.shape[1]))


@torch.library.register_fake("lead_ds::maxsim_backward")
def _fake_backward(
    grad: Tensor,
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    argmax: Tensor,
    cosine: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), d.new_empty(d.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, d, q_mask, d_mask, cosine, _, impl = inputs
    ctx.save_for_backward(q, d, q_mask, d_mask, output[1])
    ctx.rest = cosine, impl  # type: ignore[attr-defined]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple:
    q, d, q_mask, d_mask, argmax = ctx.saved_tensors  # type: ignore[attr-defined]
    cosine, impl = ctx.rest  # type: ignore[attr-defined]

    def kernel() -> tuple[Tensor, Tensor]:
        return torch.ops.lead_ds.maxsim_backward(grad, q, d, q_mask, d_mask, argmax, cosine, impl)

    def instead() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = q.detach().requires_grad_(), d.detach().requires_grad_()
            scores = maxsim(*leaves, q_mask, d_mask, cosine=cosine, impl="torch")
            return torch.autograd.grad(scores, leaves, grad)

    dq, dd = unless_refused(kernel, instead, impl, kernel="maxsim")
    return dq, dd, None, None, None, None, None


torch.library.register_autograd("lead_ds::maxsim", _differentiate, setup_context=_setup_context, lib=_LIBRARY)
