"""`grouped_attention_kl`: attention maps of two tokenizers compared over groups of tokens that cover the same
characters.

A group's share of a row is the *sum* of the probabilities of its keys (splitting a token in two moves no mass). A
group's row is the *mean* of the rows of its tokens (rows stay distributions). In the log domain the former is a segment
logsumexp of the logits.

Legend: B batch, H heads, L query rows, J keys, G groups.
"""

from collections.abc import Sequence
from functools import partial
from math import lcm

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.chunked import compute_dtype, keep
from lead_ds.kernels.attention_kl.inputs import relation_split
from lead_ds.kernels.attention_kl.reference import HIDDEN
from lead_ds.kernels.dispatch import IMPLEMENTATIONS
from lead_ds.kernels.one_visit import OneVisit

# Elements of one map of a chunk: whole heads, since a group's rows may lie anywhere.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 24


def grouped_attention_kl(
    tq: Tensor | Sequence[Tensor],
    tk: Tensor | Sequence[Tensor],
    sq: Tensor | Sequence[Tensor],
    sk: Tensor | Sequence[Tensor],
    t_groups: Tensor,
    s_groups: Tensor,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    relation_heads: int | None = None,
    count: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """KL(teacher || student) of attention over groups of tokens, in nats: a scalar; models may differ in tokenizer.

    Args:
        tq, tk: teacher queries [B, Ht, Lt, dt] and keys (fewer heads: grouped-query attention), without gradient.
        sq, sk: student queries [B, Hs, Ls, ds] and keys; they get the gradient. Each may be a list of K layers.
        t_groups, s_groups: [B, Lt], [B, Ls] integers: the group of every token, -1 = none. A group counts where both
            models have it; other tokens are hidden as keys and excluded as rows, and rows renormalised.
        teacher_scale, student_scale, temperature, relation_heads: as in `attention_kl`.
        causal: hide the keys after a row, in both models.
        count: more than the largest number of a group. None: it is looked up, for which a GPU is waited.
        impl: "auto" or "torch" (there is no Triton kernel of this form).

    Summed over key groups, averaged over real row groups, heads and layers. Raises ValueError where shapes, head counts
    or options do not fit, or where the teacher requires grad.
    """
    if impl not in IMPLEMENTATIONS or impl == "triton":
        raise ValueError(f"grouped_attention_kl: impl={impl!r} cannot run; use 'auto' or 'torch'")
    layers = [[x] if isinstance(x, Tensor) else list(x) for x in (tq, tk, sq, sk)]
    if not layers[0] or len({len(layer) for layer in layers}) != 1:
        raise ValueError("grouped_attention_kl: pass one tq, tk, sq and sk per layer pair, and at least one pair")
    if count is None:
        count = 1 + max((int(groups.max()) for groups in (t_groups, s_groups) if groups.numel()), default=0)
    values = []
    for t_q, t_k, s_q, s_k in zip(*layers, strict=True):
        if t_q.requires_grad or t_k.requires_grad:
            raise ValueError("grouped_attention_kl: the teacher's q and k get no gradient; detach() them")
        if relation_heads is not None:
            t_q, t_k = (relation_split(x, t_q.shape[1], relation_heads) for x in (t_q, t_k))
            s_q, s_k = (relation_split(x, s_q.shape[1], relation_heads) for x in (s_q, s_k))
        _check(t_q, t_k, s_q, s_k, t_groups, s_groups)
        t_scale = (t_q.shape[3] ** -0.5 if teacher_scale is None else teacher_scale) / temperature
        s_scale = (s_q.shape[3] ** -0.5 if student_scale is None else student_scale) / temperature
        with_grad = torch.is_grad_enabled() and (s_q.requires_grad or s_k.requires_grad)
        visit = partial(
            _visit, t_q, t_k, s_q, s_k, (t_groups, s_groups, max(1, count)), (t_scale, s_scale), causal, with_grad
        )
        values.append(OneVisit.apply(visit, s_q, s_k))
    return torch.stack(values).mean()


def _check(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, t_groups: Tensor, s_groups: Tensor) -> None:
    for model, q, k, groups in (("teacher", tq, tk, t_groups), ("student", sq, sk, s_groups)):
        if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            raise ValueError(f"grouped_attention_kl: {model} q {list(q.shape)} and k {list(k.shape)} do not fit")
        if q.shape[1] % k.shape[1]:
            raise ValueError(f"grouped_attention_kl: {model} has {q.shape[1]} query heads for {k.shape[1]} key heads")
        if groups.shape != (q.shape[0], q.shape[2]) or groups.is_floating_point():
            raise ValueError(
                f"grouped_attention_kl: {model} groups must be integers {[q.shape[0], q.shape[2]]}, not "
                f"{groups.dtype} {list(groups.shape)}"
            )
    if tq.shape[0] != sq.shape[0] or tq.shape[1] != sq.shape[1]:
        raise ValueError(
            f"grouped_attention_kl: teacher {list(tq.shape[:2])} and student {list(sq.shape[:2])} differ in batch or "
            "heads; for heads pass relation_heads=R"
        )


def _visit(
    tq: Tensor,
    tk: Tensor,
    sq: Tensor,
    sk: Tensor,
    groups: tuple[Tensor, Tensor, int],
    scales: tuple[float, float],
    causal: bool,
    with_grad: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value, texts and heads at a time, and the gradients to sq and sk where they are wanted."""
    dtype = compute_dtype(tq, sq)
    batch, heads = sq.shape[:2]
    given_BT, given_BS, slots = groups
    t_groups, s_groups, common_BG = _common(given_BT.to(sq.device), given_BS.to(sq.device), slots)
    weight_BG = common_BG.to(dtype)
    weight_BG /= weight_BG.sum().clamp_min(1) * heads

    total = torch.zeros((), dtype=dtype, device=sq.device)
    dq = torch.zeros(sq.shape, dtype=dtype, device=sq.device) if with_grad else None
    dk = torch.zeros(sk.shape, dtype=dtype, device=sq.device) if with_grad else None
    texts, head_step = _steps(tq, tk, sq, sk)
    for b in range(0, batch, texts):
        at = slice(b, b + texts)
        for h in range(0, heads, head_step):
            q_heads, t_keys, s_keys = (
                slice(h // group, (h + head_step) // group) for group in (1, heads // tk.shape[1], heads // sk.shape[1])
            )
            teacher = [_clean(x, t_groups[at], slots, dtype) for x in (tq[at, q_heads], tk[at, t_keys])]
            leaves = [
                _clean(x, s_groups[at], slots, dtype).requires_grad_(with_grad)
                for x in (sq[at, q_heads].detach(), sk[at, s_keys].detach())
            ]
            target = _grouped_log_probs(teacher[0], teacher[1], scales[0], t_groups[at], slots, causal)
            probability = target.exp()
            with torch.set_grad_enabled(with_grad):
                student = _grouped_log_probs(leaves[0], leaves[1], scales[1], s_groups[at], slots, causal)
                # What is impossible adds 0; NaN, which is neither, stays.
                rows = torch.where(probability == 0, 0.0, probability * (target - student)).sum(-1)
                value = (rows * weight_BG[at, None, :]).sum()
            total += value.detach()
            if dq is not None and dk is not None:
                dq[at, q_heads], dk[at, s_keys] = torch.autograd.grad(value, leaves)
    return total, () if dq is None or dk is None else (keep(dq, sq.dtype), keep(dk, sk.dtype))


def _common(t_groups: Tensor, s_groups: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both groupings, groups that only one model has moved to slot G, past the last; and which slots [B, G] count."""
    indices = [torch.where(groups < 0, slots, groups.long()) for groups in (t_groups, s_groups)]
    common = torch.ones(t_groups.shape[0], slots + 1, dtype=torch.bool, device=t_groups.device)
    for index in indices:
        common &= torch.zeros_like(common).scatter_(1, index, True)
    common[:, slots] = False
    moved = [torch.where(common.gather(1, index), index, slots) for index in indices]
    return moved[0], moved[1], common[:, :slots]


def _steps(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor) -> tuple[int, int]:
    """Texts and heads of a chunk; heads that share a key stay together in both models."""
    heads = sq.shape[1]
    unit = lcm(heads // tk.shape[1], heads // sk.shape[1])
    area = max(tq.shape[2], sq.shape[2], 1) ** 2
    budget = _GPU_CHUNK if sq.is_cuda else _CPU_CHUNK
    head_step = min(heads, unit * max(1, budget // (unit * area)))
    return (max(1, budget // (heads * area)) if head_step == heads else 1), head_step


def _clean(x: Tensor, groups: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """A copy in which tokens of no group are zero: they may hold anything, NaN included."""
    return x.to(dtype).masked_fill((groups == slots)[:, None, :, None], 0.0)


def _grouped_log_probs(q: Tensor, k: Tensor, scale: float, groups: Tensor, slots: int, causal: bool) -> Tensor:
    """log of the grouped map [B, H, G, G]; `groups` [B, L] holds `slots` for tokens of no group."""
    hidden = (groups == slots)[:, None, None, :]
    if causal:
        row = torch.arange(q.shape[2], device=q.device)
        hidden = hidden | (row[None, :] > row[:, None])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = ((q * scale) @ k.transpose(-1, -2)).masked_fill(hidden, HIDDEN)
    log_probs = logits.log_softmax(-1)
    keys = _segment_logsumexp(log_probs, groups[:, None, None, :], slots)
    rows = _segment_logsumexp(keys.transpose(-1, -2), groups[:, None, None, :], slots).transpose(-1, -2)
    size = torch.zeros(groups.shape[0], slots + 1, dtype=q.dtype, device=q.device)
    size = size.scatter_add_(1, groups, torch.ones_like(groups, dtype=q.dtype))[:, :slots]
    return rows - size.clamp_min(1).log()[:, None, :, None]


def _segment_logsumexp(x: Tensor, index: Tensor, slots: int) -> Tensor:
    """log sum exp over the elements of the last axis that share a slot: [..., J] -> [..., slots]; empty: HIDDEN."""
    index = index.expand(x.shape)
    shape = (*x.shape[:-1], slots + 1)
    peak = torch.full(shape, HIDDEN, dtype=x.dtype, device=x.device)
    peak = peak.scatter_reduce(-1, index, x.detach(), "amax")
    total = torch.zeros(shape, dtype=x.dtype, device=x.device)
    total = total.scatter_add(-1, index, (x - peak.gather(-1, index)).exp())
    tiny = torch.finfo(x.dtype).tiny
    return (peak + total.clamp_min(tiny).log())[..., :slots]
