"""`interaction_attention`: query tokens attending to passage tokens, compared between teacher and student (VIRT).

Legend: K layers, Q queries, P passages, N passages per query, Lq and Ld tokens, D width. Independent products are counted
by G: one per layer where every query meets every passage, one per layer and query where it meets its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.chunked import compute_dtype, exponential_, keep
from lead_ds.kernels.attention_kl.reference import HIDDEN
from lead_ds.kernels.dispatch import resolve, with_fallback
from lead_ds.kernels.one_visit import OneVisit

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
        divergence: "kl": KL(teacher || student) in nats, averaged over real query tokens, passages and layers. "mse":
        squared difference of the probabilities, summed over each map, averaged over maps (one per query,
            passage and layer). It is the baseline in LEAD (Sun et al., 2023), after VIRT (Li et al., 2021).
        teacher_scale, student_scale: multiply the dot products.
        pairs: "all": every query against every passage; "own": P = Q * N, query i against passages
            i * N .. i * N + N - 1.
        impl: "auto", "triton" or "torch".

    Both models need the same tokens. Returns a float32 scalar (float64 for float64 inputs).
    Raises ValueError where shapes or options do not fit, or where the teacher requires grad.
    """
    tq, td, sq, sd = (x.unsqueeze(0) if x.dim() == 3 else x for x in (tq, td, sq, sd))
    _check(tq, td, sq, sd, q_mask, d_mask, divergence, pairs)
    implementation: str = resolve(impl, tq, td, sq, sd, kernel="interaction_attention")
    if implementation == "triton":
        from lead_ds.kernels.interaction.triton_kernel import MAX_LENGTH

        if td.shape[2] > MAX_LENGTH:
            if impl == "triton":
                raise ValueError(f"interaction_attention: impl='triton' takes passages of up to {MAX_LENGTH} tokens")
            implementation = "torch"

    def run(chosen: str) -> Tensor:
        call = _Call(
            divergence,
            (float(teacher_scale), float(student_scale)),
            own=pairs == "own",
            triton=chosen != "torch",
            with_grad=torch.is_grad_enabled() and (sq.requires_grad or sd.requires_grad),
        )
        return OneVisit.apply(lambda: _visit(tq, td, sq, sd, q_mask, d_mask, call), sq, sd)

    return with_fallback(run, impl, implementation, kernel="interaction_attention")


class _Call(NamedTuple):
    """What is requested, other than tensors."""

    divergence: str
    scales: tuple[float, float]
    own: bool
    triton: bool
    with_grad: bool


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


def _visit(
    tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, call: _Call
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value, and the gradients to sq and sd where they are wanted."""
    layers, queries, q_length, _ = tq.shape
    passages, d_length = td.shape[1:3]
    device, dtype = sq.device, compute_dtype(tq, sq)
    groups = queries if call.own else 1
    q_real = _real(q_mask, queries, q_length, device)
    d_real = _real(d_mask, passages, d_length, device)
    real_GRN = q_real.view(groups, -1)[:, :, None] & d_real.any(-1).view(groups, -1)[:, None, :]
    maps = passages if call.own else queries * passages
    norm = (real_GRN.sum().clamp_min(1).to(dtype) if call.divergence == "kl" else max(maps, 1)) * layers
    d_real = d_real.view(groups, passages // groups, d_length)

    total = torch.zeros((), dtype=dtype, device=device)
    dq = torch.zeros(layers * groups, real_GRN.shape[1], sq.shape[3] * call.with_grad, dtype=dtype, device=device)
    dd = torch.zeros(layers * groups, passages // groups * d_length, dq.shape[2], dtype=dtype, device=device)
    # A library's half-precision product rounds nothing but its inputs when it gives float32.
    half = call.triton and sq.is_cuda and tq.dtype == sq.dtype and sq.dtype in (torch.float16, torch.bfloat16)
    work = sq.dtype if half else dtype
    for layer in range(layers if real_GRN.numel() and d_length else 0):
        # A padded token may hold anything, NaN included, and 0 * NaN would reach the gradient.
        clean = [
            (x[layer] if mask is None else x[layer].masked_fill((mask == 0)[:, :, None], 0.0)).to(work)
            for x, mask in ((tq, q_mask), (td, d_mask), (sq, q_mask), (sd, d_mask))
        ]
        t_q, t_d, s_q, s_d = (x.reshape(groups, -1, x.shape[2]) for x in clean)
        for g, r, p in _blocks(groups, real_GRN.shape[1], passages // groups, d_length, sq.is_cuda):
            tokens = slice(p.start * d_length, p.stop * d_length)
            shape = (g.stop - g.start, r.stop - r.start, p.stop - p.start, d_length)
            teacher, student = (
                _product(q[g, r], d[g, tokens].transpose(1, 2), dtype).view(shape) for q, d in ((t_q, t_d), (s_q, s_d))
            )
            visible = None if d_mask is None else d_real[g, p]
            value, gradient = _block(teacher, student, visible, real_GRN[g, r, p], call, work)
            total += value
            if gradient is not None:
                gradient = gradient.view(shape[0], shape[1], -1)
                at = slice(layer * groups + g.start, layer * groups + g.stop)
                dq[at, r] += _product(gradient, s_d[g, tokens], dtype)
                dd[at, tokens] += _product(gradient.transpose(1, 2), s_q[g, r], dtype)
    if not call.with_grad:
        return total / norm, ()
    scale = call.scales[1] / norm
    return total / norm, (keep((dq * scale).view(sq.shape), sq.dtype), keep((dd * scale).view(sd.shape), sd.dtype))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched a @ b in `dtype`, whatever theirs."""
    return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, out_dtype=dtype)


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
    teacher: Tensor, student: Tensor, visible: Tensor | None, real: Tensor, call: _Call, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Summed divergence of a block of unscaled logits [g, r, n, L], and its gradient to the student's scaled logits.

    visible [g, n, L]: tokens that may be attended to; real [g, r, n]: rows that count.
    """
    if call.triton:
        from lead_ds.kernels.interaction.triton_kernel import divergence

        kl = call.divergence == "kl"
        return divergence(teacher, student, call.scales, visible, real, kl, grad_dtype if call.with_grad else None)
    for logits, scale in ((teacher, call.scales[0]), (student, call.scales[1])):
        logits *= scale
        if visible is not None:
            logits.masked_fill_(~visible[:, None], HIDDEN)
    weight = real[..., None].to(student.dtype)
    if call.divergence == "kl":
        log_t, log_s = teacher.log_softmax(-1), student.log_softmax(-1)
        difference = log_t - log_s
        probability = exponential_(log_t)
        value = (difference.mul_(probability).sum(-1, keepdim=True) * weight).sum()
        return value, exponential_(log_s).sub_(probability).mul_(weight) if call.with_grad else None
    student_probability = student.softmax(-1)
    difference = student_probability - teacher.softmax(-1)
    value = (difference.square().sum(-1, keepdim=True) * weight).sum()
    if not call.with_grad:
        return value, None
    mean = (student_probability * difference).sum(-1, keepdim=True)
    return value, difference.sub_(mean).mul_(student_probability).mul_(2 * weight)
