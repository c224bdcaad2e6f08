"""`impl="torch"`: the attention KL and its gradient in chunks of the map, so that no full L x L map ever exists.

A chunk is a block of texts, heads and query rows whose maps stay in the processor's caches. The gradient comes out of
the same visit as the value (the map is there anyway), which spares the backward pass two of its products. What is kept
until then is one tensor of the size of each input.

Legend: B batch, H heads, L query rows, J keys, d head dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import e, isfinite, lcm, log2

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.inputs import LayerPair
from lead_ds.kernels.attention_kl.reference import HIDDEN

# Elements of one map of a chunk: three float32 maps of this size fit a core's share of the cache. A GPU wants big
# blocks.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 25
# A head-averaged log-probability below this is an event of probability 0 in any dtype; finite, so that 0 * log 0 is 0.
_FLOOR = -1e4
_LOG2_E = log2(e)


@dataclass(frozen=True)
class _Block:
    """Half-open ranges of texts, (teacher) heads, rows and visible keys."""

    texts: slice
    heads: slice
    rows: slice
    keys: slice


@dataclass(frozen=True)
class _Hidden:
    """Padded tokens, and the bias that hides them as keys."""

    tokens_BL: Tensor
    bias_BL: Tensor

    @classmethod
    def of(cls, tokens_BL: Tensor, dtype: torch.dtype) -> "_Hidden":
        bias = torch.zeros(tokens_BL.shape, dtype=dtype, device=tokens_BL.device)
        return cls(tokens_BL, bias.masked_fill_(tokens_BL, HIDDEN))


def attention_kl_chunked(
    pairs: list[LayerPair], mask: Tensor | None, causal: bool, head_mean: bool, with_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """KL of every layer pair [K], and, if requested, its gradients to each student q and k in turn (as `keep` keeps them)."""
    results = [_one_pair(pair, mask, causal, head_mean, with_grad) for pair in pairs]
    return torch.stack([value for value, _ in results]), [x for _, grad in results for x in grad or ()]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Where the softmax runs: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def keep(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient as it waits for the backward: in the input's dtype, but for float16, where it would underflow before
    the loss scale multiplies it.
    """
    return gradient if dtype == torch.float16 else gradient.to(dtype)


def exponential_(x: Tensor) -> Tensor:
    """exp in place, by base 2: torch's exp on a CPU is up to 60 times slower, most of all where the result underflows."""
    return x.mul_(_LOG2_E).exp2_()


def _one_pair(
    pair: LayerPair, mask: Tensor | None, causal: bool, head_mean: bool, with_grad: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    dtype = compute_dtype(pair.tq, pair.sq)
    device = pair.sq.device
    batch, heads, length, _ = pair.sq.shape
    averaged = 1 if head_mean else heads
    weight_BL: Tensor | None = None
    hidden = None
    if mask is not None:
        real_BL = mask.to(device) != 0
        weight_BL = real_BL.to(dtype)
        weight_BL /= weight_BL.sum().clamp_min(1) * averaged
        hidden = _Hidden.of(~real_BL, dtype)

    total = torch.zeros((), dtype=dtype, device=device)
    dsq = torch.empty(pair.sq.shape, dtype=dtype, device=device) if with_grad else None
    dsk = torch.zeros(pair.sk.shape, dtype=dtype, device=device) if with_grad else None
    work = _Workspace(dtype, device)
    for block in _blocks(pair, causal, head_mean):
        teacher, _, _ = _logits(pair.tq, pair.tk, pair.teacher_scale, block, hidden, work, "teacher", head_mean)
        student, q, k = _logits(pair.sq, pair.sk, pair.student_scale, block, hidden, work, "student", head_mean)
        for logits in (teacher, student):
            _hide(logits, block, hidden, causal, pair.band)
        weight: Tensor | float
        weight = (
            1 / (batch * length * averaged) if weight_BL is None else weight_BL[block.texts, None, block.rows, None]
        )
        divergence = _head_mean_divergence if head_mean else _divergence
        value, gradient = divergence(teacher, student, weight, with_grad, work)
        total += value
        if dsq is None or dsk is None or gradient is None:
            continue
        gradient = gradient.view(q.shape[0], q.shape[1], -1)
        group = heads // pair.sk.shape[1]
        key_heads = slice(0, pair.sk.shape[1]) if head_mean else _divide(block.heads, group)
        query_heads = slice(0, heads) if head_mean else block.heads
        out = dsq[block.texts, query_heads, block.rows]
        torch.mul(torch.bmm(gradient, k).view(out.shape), pair.student_scale, out=out)
        out = dsk[block.texts, key_heads, block.keys]
        out.add_(torch.bmm(gradient.transpose(1, 2), q).view(out.shape), alpha=pair.student_scale)
    if dsq is None or dsk is None:
        return total, None
    return total, (keep(dsq, pair.sq.dtype), keep(dsk, pair.sk.dtype))


class _Workspace:
    """Buffers that chunks of equal size share, so that a chunk costs no allocation and no page fault."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return buffer[:size].view(shape)


def _blocks(pair: LayerPair, causal: bool, head_mean: bool) -> Iterator[_Block]:
    batch, heads, length, _ = pair.tq.shape
    if batch == 0 or length == 0:
        return
    budget = _GPU_CHUNK if pair.sq.is_cuda else _CPU_CHUNK
    # Heads that share a key stay together, in the teacher and in the student; averaged heads all do.
    unit = heads if head_mean else lcm(heads // pair.tk.shape[1], pair.sq.shape[1] // pair.sk.shape[1])
    wide = max(heads, pair.sq.shape[1]) if head_mean else unit
    texts, head_step, row_step = 1, unit, length
    if wide * length * length > budget:
        row_step = min(length, max(16, budget // (wide * length)))
    else:
        head_step = min(heads, unit * max(1, budget // (wide * length * length)))
        if head_step == heads:
            texts = max(1, budget // (max(wide, heads) * length * length))
    for b in range(0, batch, texts):
        for h in range(0, heads, head_step):
            for r in range(0, length, row_step):
                end = min(r + row_step, length)
                first = 0 if pair.band is None else max(0, r - pair.band)
                last = end if causal else (length if pair.band is None else min(length, end + pair.band))
                yield _Block(
                    slice(b, min(b + texts, batch)),
                    slice(h, min(h + head_step, heads)),
                    slice(r, end),
                    slice(first, last),
                )


def _divide(heads: slice, group: int) -> slice:
    return slice(heads.start // group, heads.stop // group)


def _logits(
    q: Tensor,
    k: Tensor,
    scale: float,
    block: _Block,
    hidden: _Hidden | None,
    work: _Workspace,
    model: str,
    head_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [b, h, l, j] of a block, with the q [b * hk, g * l, d] and the k [b * hk, j, d] they came from."""
    group = q.shape[1] // k.shape[1]
    heads = slice(0, q.shape[1]) if head_mean else block.heads
    q_part = q[block.texts, heads, block.rows].to(work.dtype)
    k_part = k[block.texts, _divide(heads, group), block.keys].to(work.dtype)
    if hidden is not None:
        q_part = _clean(q_part, hidden.tokens_BL[block.texts, block.rows])
        k_part = _clean(k_part, hidden.tokens_BL[block.texts, block.keys])
    texts, heads_here, rows, dim = q_part.shape
    keys = k_part.shape[2]
    rows_q = q_part.reshape(texts * heads_here // group, group * rows, dim)
    rows_k = k_part.reshape(texts * heads_here // group, keys, dim)
    logits = work.take(f"{model} map", *rows_q.shape[:2], keys)
    torch.baddbmm(logits, rows_q, rows_k.transpose(1, 2), beta=0, alpha=scale, out=logits)
    return logits.view(texts, heads_here, rows, keys), rows_q, rows_k


def _clean(x: Tensor, hidden_BL: Tensor) -> Tensor:
    """Zeros where tokens are padding: they may hold anything, NaN included, and 0 * NaN would reach the gradient."""
    # On a CPU a sum in the cache, which finds NaN and infinity, costs less than the copy it mostly spares.
    if not x.is_cuda and isfinite(x.sum().item()):
        return x
    return x.masked_fill(hidden_BL[:, None, :, None], 0.0)


def _hide(logits: Tensor, block: _Block, hidden: _Hidden | None, causal: bool, band: int | None) -> None:
    if hidden is not None:
        logits += hidden.bias_BL[block.texts, None, None, block.keys]
    if causal or band is not None:
        row = torch.arange(block.rows.start, block.rows.stop, device=logits.device)[:, None]
        key = torch.arange(block.keys.start, block.keys.stop, device=logits.device)[None, :]
        outside = key > row if causal else torch.zeros_like(key > row)
        if band is not None:
            outside |= (row - key).abs() > band
        logits.masked_fill_(outside, HIDDEN)


def _weighted_sum(rows: Tensor, weight: Tensor | float) -> Tensor:
    return (rows * weight).sum() if isinstance(weight, Tensor) else rows.sum() * weight


def _divergence(
    teacher: Tensor, student: Tensor, weight: Tensor | float, with_grad: bool, work: _Workspace
) -> tuple[Tensor, Tensor | None]:
    """Weighted KL of a block of logits, and its gradient to the student's logits (in the student's memory)."""
    log_t = torch.ops.aten._log_softmax.out(teacher, -1, False, out=work.take("log", *teacher.shape))
    log_s = torch.ops.aten._log_softmax.out(student, -1, False, out=teacher)
    # The difference of log-probabilities, not of logits: both are centred, so an offset of the logits costs no digits.
    difference = torch.sub(log_t, log_s, out=student)
    probability = exponential_(log_t)
    value = _weighted_sum(difference.mul_(probability).sum(-1, keepdim=True), weight)
    if not with_grad:
        return value, None
    return value, exponential_(log_s).sub_(probability).mul_(weight)


def _head_mean_divergence(
    teacher: Tensor, student: Tensor, weight: Tensor | float, with_grad: bool, work: _Workspace
) -> tuple[Tensor, Tensor | None]:
    """The same for the KL of the two models' head-averaged distributions."""
    log_t = teacher.log_softmax(-1).clamp_min_(_FLOOR)
    log_s = student.log_softmax(-1).clamp_min_(_FLOOR)
    mean_t = log_t.logsumexp(1, keepdim=True) - torch.log(torch.tensor(float(teacher.shape[1]), dtype=work.dtype))
    pooled_s = log_s.logsumexp(1, keepdim=True)
    mean_s = pooled_s - torch.log(torch.tensor(float(student.shape[1]), dtype=work.dtype))
    probability = mean_t.exp()
    value = _weighted_sum(((mean_t - mean_s) * probability).sum(-1, keepdim=True), weight)
    if not with_grad:
        return value, None
    # d KL / d log s_h = -t s_h / sum_h s_h; then through that head's log-softmax.
    to_log_s = -probability * (log_s - pooled_s).exp()
    return value, (to_log_s - log_s.exp() * to_log_s.sum(-1, keepdim=True)) * weight
