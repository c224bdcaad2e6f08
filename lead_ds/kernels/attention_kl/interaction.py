"""`interaction_attention`: query tokens attending to passage tokens, compared between teacher and student (VIRT).

Legend: K layers, Q queries, P passages, N passages per query, Lq and Ld tokens, D width. Independent products are counted
by G: one per layer where every query meets every passage, one per layer and query where it meets its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lead_ds.kernels.attention_kl.chunked import compute_dtype, exponential_, keep
from lead_ds.kernels.attention_kl.reference import HIDDEN
from lead_ds.kernels.dispatch import resolve

_DIVERGENCES = ("kl", "mse")
_PAIRS = ("all", "own")
# Elements of one map of a chunk, as in chunked.py.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 26


def interaction_attention(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    divergence: str = "kl",
    teacher_scale: float = 1.0,
    student_scale: float = 1.0,
    pairs: str = "all",
    impl: str = "auto",
) -> Tensor:
    """Divergence of two models' query-to-passage token attention, softmax(scale q d^T) over passage tokens: a scalar.

    Args:
        tq, td: teacher query tokens [K, Q, Lq, Dt] and passage tokens [K, P, Ld, Dt]; K may be left out. No gradient.
        sq, sd: the student's, width Ds; they get the gradient.
        q_mask, d_mask: [Q, Lq], [P, Ld], nonzero = real. Masked passage tokens get no attention; masked query
            tokens and empty passages do not count.
        divergence: "kl": KL(teacher || student) in nats, averaged over real query tokens, passages and layers;
            "mse": squared difference of the probabilities, summed over each map, averaged over maps (one per query,
            passage and layer): the baseline in LEAD (Sun et al., 2023), after VIRT (Li et al., 2021).
        teacher_scale, student_scale: multiply the dot products.
        pairs: "all": every query against every passage; "own": P = Q * N, query i against passages
            i * N .. i * N + N - 1.
        impl: "auto", "triton" or "torch".

    Both models need the same tokens. Returns a float32 scalar (float64 for float64 inputs).
    Raises ValueError where shapes or options do not fit, or where the teacher requires grad.
    """
    tq, td, sq, sd = (x.unsqueeze(0) if x.dim() == 3 else x for x in (tq, td, sq, sd))
    _check(tq, td, sq, sd, q_mask, d_mask, divergence, pairs)
    implementation = resolve(impl, tq, td, sq, sd, kernel="interaction_attention")
    scales = (teacher_scale, student_scale)
    return _Interaction.apply(tq, td, sq, sd, q_mask, d_mask, divergence, scales, pairs == "own", implementation)


def _check(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    divergence: str,
    pairs: str,
) -> None:
    name = "interaction_attention"
    if divergence not in _DIVERGENCES:
        raise ValueError(f"{name}: unknown divergence {divergence!r}; use one of {', '.join(_DIVERGENCES)}")
    if pairs not in _PAIRS:
        raise ValueError(f"{name}: unknown pairs {pairs!r}; use one of {', '.join(_PAIRS)}")
    if any(x.dim() != 4 for x in (tq, td, sq, sd)):
        raise ValueError(f"{name}: tokens must be [K, texts, tokens, width] or [texts, tokens, width]")
    if tq.requires_grad or td.requires_grad:
        raise ValueError(f"{name}: the teacher's tokens get no gradient; detach() them")
    if tq.shape[:3] != sq.shape[:3] or td.shape[:3] != sd.shape[:3] or tq.shape[0] != td.shape[0]:
        raise ValueError(
            f"{name}: teacher {list(tq.shape[:3])} x {list(td.shape[:3])} and student {list(sq.shape[:3])} x "
            f"{list(sd.shape[:3])} differ in layers, texts or tokens; both need the same tokenisation"
        )
    if tq.shape[3] != td.shape[3] or sq.shape[3] != sd.shape[3]:
        raise ValueError(f"{name}: a model's query and passage tokens differ in width")
    if q_mask is not None and q_mask.shape != tq.shape[1:3]:
        raise ValueError(f"{name}: q_mask must be {list(tq.shape[1:3])}, not {list(q_mask.shape)}")
    if d_mask is not None and d_mask.shape != td.shape[1:3]:
        raise ValueError(f"{name}: d_mask must be {list(td.shape[1:3])}, not {list(d_mask.shape)}")
    if pairs == "own" and (tq.shape[1] == 0 or td.shape[1] % tq.shape[1]):
        raise ValueError(f"{name}: pairs='own' with {td.shape[1]} passages for {tq.shape[1]} queries")


class _Interaction(torch.autograd.Function):
    """Value and gradient in one visit of the map; backward only scales the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        tq: Tensor,
        td: Tensor,
        sq: Tensor,
        sd: Tensor,
        q_mask: Tensor | None,
        d_mask: Tensor | None,
        divergence: str,
        scales: tuple[float, float],
        own: bool,
        implementation: str,
    ) -> Tensor:
        with_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        value, gradients = _visit(tq, td, sq, sd, q_mask, d_mask, divergence, scales, own, implementation, with_grad)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = sq.dtype, sd.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dq, dd = (
            (gradient * grad.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, dq, dd, *(None,) * 6)


def _visit(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    divergence: str,
    scales: tuple[float, float],
    own: bool,
    implementation: str,
    with_grad: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    layers, queries, q_length, _ = tq.shape
    passages, d_length = td.shape[1:3]
    device, dtype = sq.device, compute_dtype(tq, sq)
    groups = queries if own else 1
    q_real = _real(q_mask, queries, q_length, device)
    d_real = _real(d_mask, passages, d_length, device)

    rows_real = q_real.view(groups, -1)
    passages_real = d_real.any(-1).view(groups, -1)
    weight = (rows_real[:, :, None] & passages_real[:, None, :]).to(dtype)
    maps = passages if own else queries * passages
    weight /= (weight.sum().clamp_min(1) if divergence == "kl" else max(maps, 1)) * layers
    # A padded token may hold anything, NaN included, and 0 * NaN would reach the gradient.
    hide_q = None if q_mask is None else ~q_real[None, :, :, None]
    hide_d = None if d_mask is None else ~d_real[None, :, :, None]
    bias = None
    if d_mask is not None:
        bias = torch.zeros(groups, 1, passages // groups, d_length, dtype=dtype, device=device)
        bias.masked_fill_(~d_real.view(bias.shape), HIDDEN)

    total = torch.zeros((), dtype=dtype, device=device)
    if with_grad:
        dq = torch.zeros(layers * groups, weight.shape[1], sq.shape[3], dtype=dtype, device=device)
        dd = torch.zeros(layers * groups, passages // groups * d_length, sd.shape[3], dtype=dtype, device=device)
    else:
        dq = dd = torch.empty(0, dtype=dtype, device=device)
    for layer in range(layers if weight.numel() and d_length else 0):
        one = slice(layer, layer + 1)
        clean = [
            (x[one] if hide is None else x[one].masked_fill(hide, 0.0)).to(dtype)
            for x, hide in ((tq, hide_q), (td, hide_d), (sq, hide_q), (sd, hide_d))
        ]
        t_q, t_d, s_q, s_d = (x.reshape(groups, -1, x.shape[3]) for x in clean)
        for g, r, p in _blocks(groups, weight.shape[1], passages // groups, d_length, sq.is_cuda):
            d_range = slice(p.start * d_length, p.stop * d_length)
            shape = (g.stop - g.start, r.stop - r.start, p.stop - p.start, d_length)
            teacher = torch.bmm(t_q[g, r] * scales[0], t_d[g, d_range].transpose(1, 2)).view(shape)
            student = torch.bmm(s_q[g, r] * scales[1], s_d[g, d_range].transpose(1, 2)).view(shape)
            if bias is not None:
                teacher += bias[g, :, p]
                student += bias[g, :, p]
            value, gradient = _block(teacher, student, weight[g, r, p], divergence, with_grad)
            total += value
            if with_grad and gradient is not None:
                gradient = gradient.view(shape[0], shape[1], -1)
                at = slice(layer * groups + g.start, layer * groups + g.stop)
                dq[at, r] += torch.bmm(gradient, s_d[g, d_range]) * scales[1]
                dd[at, d_range] += torch.bmm(gradient.transpose(1, 2), s_q[g, r]) * scales[1]
    if not with_grad:
        return total, ()
    return total, (keep(dq.view(sq.shape), sq.dtype), keep(dd.view(sd.shape), sd.dtype))


def _real(mask: Tensor | None, texts: int, tokens: int, device: torch.device) -> Tensor:
    return torch.ones(texts, tokens, dtype=torch.bool, device=device) if mask is None else mask.to(device) != 0


def _blocks(groups: int, rows: int, passages: int, d_length: int, cuda: bool) -> list[tuple[slice, slice, slice]]:
    budget = _GPU_CHUNK if cuda else _CPU_CHUNK
    row_step = min(rows, max(16, budget // d_length))
    passage_step = min(passages, max(1, budget // (row_step * d_length)))
    group_step = min(groups, max(1, budget // (rows * passages * d_length)))
    return [
        (
            slice(g, min(g + group_step, groups)),
            slice(r, min(r + row_step, rows)),
            slice(p, min(p + passage_step, passages)),
        )
        for g in range(0, groups, group_step)
        for p in range(0, passages, passage_step)
        for r in range(0, rows, row_step)
    ]


def _block(
    teacher: Tensor, student: Tensor, weight: Tensor, divergence: str, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted divergence of a block of logits over the last axis, and its gradient to the student's logits."""
    if divergence == "kl":
        log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
        difference = log_t - log_s
        probability = exponential_(log_t)
        value = (difference.mul_(probability).sum(-1) * weight).sum()
        return value, exponential_(log_s).sub_(probability).mul_(weight[..., None]) if with_grad else None
    student_probability = student.softmax(-1)
    difference = student_probability - teacher.softmax(-1)
    value = (difference.square().sum(-1) * weight).sum()
    if not with_grad:
        return value, None
    mean = (student_probability * difference).sum(-1, keepdim=True)
    return value, difference.sub_(mean).mul_(student_probability).mul_(2 * weight[..., None])
