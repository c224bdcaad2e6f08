"""`attention_kl`: the public function over the implementations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lead_ds.kernels.attention_kl.chunked import attention_kl_chunked
from lead_ds.kernels.attention_kl.inputs import LayerPair, Maps, Tensors, layer_pairs
from lead_ds.kernels.dispatch import resolve, unless_refused, with_fallback
from lead_ds.kernels.one_visit import OneVisit

# By whether heads are averaged: a device that refuses the one kernel may run the other.
_NAMES = {False: "attention_kl", True: "attention_kl of averaged heads"}


def attention_kl(
    tq: Tensors,
    tk: Tensors,
    sq: Tensors,
    sk: Tensors,
    mask: Tensor | None = None,
    *,
    teacher_scale: float | Sequence[float] | None = None,
    student_scale: float | Sequence[float] | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    relation_heads: int | None = None,
    impl: str = "auto",
    band: int | Sequence[int | None] | None = None,
    head_mean: bool = False,
    atomic: bool = False,
    per_pair: bool = False,
) -> Tensor:
    """KL(teacher || student) of two models' attention distributions, in nats: a scalar.

    Summed over keys, averaged over real query rows, heads and layer pairs; no L x L map is kept in memory.

    Args:
        tq, tk: teacher queries [B, Ht, L, dt] and keys (fewer heads: grouped-query attention), without gradient.
        sq, sk: student queries [B, Hs, L, ds] and keys; they get the gradient. Each of the four may be a list of K
            tensors, one per layer pair, equal in B and L.
        mask: [B, L], nonzero = real; hides keys and excludes query rows. None: every token is real.
        teacher_scale, student_scale: what multiplies q . k; default 1 / sqrt(head dimension), after relation heads.
        temperature: divides both models' logits.
        causal: hide the keys after a row, in both models.
        relation_heads: concatenate the heads and re-split them into this many (MiniLMv2, Wang et al., 2021), so that
            models with different head counts compare.
        impl: "auto", "triton" or "torch".
        band: hide keys farther than this many positions from a row.
        head_mean: compare the distributions averaged over each model's heads, which may differ in number.
        atomic: let the Triton backward add up with atomics: one kernel instead of two, but sums in no fixed order.
            Heads wider than 128, and averaged heads, take the two.
        per_pair: the value of every layer pair, [K], in place of their mean.

    Returns a float32 scalar (float64 for float64 inputs); 0 if no row is real; NaN if an input that counts is NaN.
    One pass forward and recomputation backward are also what StreamKL does (Liu et al., 2026, arXiv 2606.20005).
    Raises ValueError where shapes or head counts do not fit, or where the teacher requires grad.
    """
    pairs = layer_pairs(
        Maps(tq, tk, teacher_scale),
        Maps(sq, sk, student_scale),
        mask,
        temperature=temperature,
        relation_heads=relation_heads,
        band=band,
        head_mean=head_mean,
    )
    students = [tensor for pair in pairs for tensor in (pair.sq, pair.sk)]
    with_grad = torch.is_grad_enabled() and any(student.requires_grad for student in students)

    def run(chosen: str) -> Tensor:
        if chosen == "torch":
            return OneVisit.apply(lambda: attention_kl_chunked(pairs, mask, causal, head_mean, with_grad), *students)
        return _AttentionKLTriton.apply(pairs, mask, causal, head_mean, atomic, chosen, *students)

    values_K = with_fallback(run, impl, _implementation(impl, pairs, head_mean), kernel=_NAMES[head_mean])
    return values_K if per_pair else values_K.mean()


def _implementation(impl: str, pairs: list[LayerPair], head_mean: bool) -> str:
    tensors = [tensor for pair in pairs for tensor in (pair.tq, pair.tk, pair.sq, pair.sk)]
    chosen = resolve(impl, *tensors, kernel=_NAMES[head_mean])
    if chosen == "torch":
        return chosen
    from lead_ds.kernels.attention_kl.triton_kernel import MAX_WIDTH, supported

    if supported(pairs):
        return chosen
    if impl == "triton":
        raise ValueError(f"attention_kl: impl='triton' cannot run here: heads wider than {MAX_WIDTH} have no kernel")
    return "torch"


class _AttentionKLTriton(torch.autograd.Function):
    """The kernels: log-sum-exps are kept, probabilities recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        pairs: list[LayerPair],
        mask: Tensor | None,
        causal: bool,
        head_mean: bool,
        atomic: bool,
        impl: str,
        *students: Tensor,
    ) -> Tensor:
        from lead_ds.kernels.attention_kl import head_mean_kernel, triton_kernel

        pairs = [triton_kernel.dense(pair) for pair in pairs]
        saved: Any
        if head_mean:
            values, saved = head_mean_kernel.forward(pairs, mask, causal, with_grad=any(ctx.needs_input_grad))
        else:
            values, saved = triton_kernel.forward(pairs, mask, causal)
        ctx.rest = pairs, saved, causal, head_mean, atomic, impl
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        from lead_ds.kernels.attention_kl import head_mean_kernel, triton_kernel

        pairs, saved, causal, head_mean, atomic, impl = ctx.rest

        def kernels() -> list[tuple[Tensor, Tensor]]:
            if head_mean:
                return head_mean_kernel.backward(grad_K, pairs, saved, causal)
            return triton_kernel.backward(grad_K, pairs, saved, causal, atomic)

        def instead() -> list[tuple[Tensor, Tensor]]:
            _, found = attention_kl_chunked(pairs, saved.mask, causal, head_mean, with_grad=True)
            return [
                ((dq * weight).to(pair.sq.dtype), (dk * weight).to(pair.sk.dtype))
                for pair, weight, dq, dk in zip(pairs, grad_K.unbind(), found[::2], found[1::2], strict=True)
            ]

        gradients = unless_refused(kernels, instead, impl, kernel=_NAMES[head_mean])
        return (*(None,) * 6, *(tensor for gradient in gradients for tensor in gradient))
