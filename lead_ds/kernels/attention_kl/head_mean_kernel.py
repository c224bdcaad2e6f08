"""Launching the Triton attention KL of head-averaged maps, and what is kept for its backward.

Dimensions: K pairs, B texts, H heads, L tokens, d width of a head.
"""

from collections.abc import Iterator
from math import e, log, log2
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.attention_kl.head_mean_programs import head_mean_gradient_kernel, head_mean_kernel, lse_kernel
from lead_ds.kernels.attention_kl.inputs import LayerPair
from lead_ds.kernels.attention_kl.tiles import Tiles, listed
from lead_ds.kernels.attention_kl.triton_kernel import (
    constants_of,
    either,
    groups_of,
    inputs_of,
    mask_facts,
    options_of,
    strides_of,
)
from lead_ds.kernels.dispatch import shared_memory
from lead_ds.kernels.launch import launch

_LN_2 = log(2)
_LOG2_E = log2(e)


class Group(NamedTuple):
    """Layer pairs of one launch, and their maxima and logarithms of sums [members, B, H, 2, L] in base 2.

    change [members, B, Hs, L]: of the student's heads, what the gradient subtracts (E in the programs).
    """

    members: list[int]
    t_lse: Tensor
    s_lse: Tensor
    change: Tensor


class Saved(NamedTuple):
    """What the backward needs in addition to q and k: the groups, the mask and its bounds, and 1 / the number of real rows."""

    groups: list[Group]
    mask: Tensor | None
    bounds: Tensor | None
    weight: Tensor


def forward(pairs: list[LayerPair], mask: Tensor | None, causal: bool, with_grad: bool) -> tuple[Tensor, Saved]:
    """KL of every pair's head-averaged maps [K], and what the backward needs (nothing useful without `with_grad`)."""
    batch, _, length, _ = pairs[0].sq.shape
    device = pairs[0].sq.device
    if batch * length == 0:
        zero = torch.zeros((), device=device)
        return torch.zeros(len(pairs), device=device), Saved([], None, None, zero)
    mask, bounds, weight = mask_facts(mask, batch, length, device)
    values: list[Tensor] = [weight] * len(pairs)
    groups = []
    for members in groups_of(pairs):
        group = [pairs[k] for k in members]
        pair = group[0]
        t_lse, s_lse = (_log_sum_exps(group, side, mask, bounds, causal) for side in ("t", "s"))
        tiles = _tiles("mean", pair)
        row_tiles = triton.cdiv(length, tiles.rows)
        partial = torch.empty(len(group), batch * row_tiles, dtype=torch.float32, device=device)
        change = partial
        if with_grad:
            change = torch.zeros(len(group), batch, pair.sq.shape[1], length, dtype=torch.float32, device=device)
        launch(
            head_mean_kernel, (batch * row_tiles, len(group)), *inputs_of(group), either(mask, partial),
            either(bounds, partial), partial, change, t_lse, s_lse,
            *strides_of(pair.tq, pair.tk, pair.sq, pair.sk), *_sizes(pair), pair.band or 0, row_tiles,
            PAIRS=len(group), WITH_GRAD=with_grad, **constants_of(pair, tiles, mask is not None, causal),
            **options_of(tiles),
        )  # fmt: skip
        groups.append(Group(members, t_lse, s_lse, change))
        for k, value in zip(members, (partial.sum(1) * (weight * _LN_2)).unbind(), strict=True):
            values[k] = value
    return torch.stack(values), Saved(groups, mask, bounds, weight)


def backward(grad: Tensor, pairs: list[LayerPair], saved: Saved, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Gradients of every pair's student q and k; `grad` [K]."""
    if not saved.groups:
        return [(torch.zeros_like(pair.sq), torch.zeros_like(pair.sk)) for pair in pairs]
    found: dict[int, list[Tensor]] = {}
    batch, _, length, _ = pairs[0].sq.shape
    grad = (grad.to(torch.float32) * saved.weight).contiguous()
    for members, t_lse, s_lse, change in saved.groups:
        group = [pairs[k] for k in members]
        pair, heads = group[0], group[0].sq.shape[1]
        group_grad = grad if len(group) == len(pairs) else torch.stack([grad[k] for k in members])
        for of_rows, x in ((True, pair.sq), (False, pair.sk)):
            tiles = _tiles("mean dq" if of_rows else "mean dk", pair)
            count = triton.cdiv(length, tiles.rows if of_rows else tiles.keys)
            summed = torch.zeros(len(group), *x.shape, dtype=torch.float32, device=x.device)
            launch(
                head_mean_gradient_kernel, (batch * count, len(group)), *inputs_of(group), summed,
                either(saved.mask, t_lse), either(saved.bounds, t_lse), group_grad, change, t_lse, s_lse,
                *strides_of(pair.tq, pair.tk, pair.sq, pair.sk), *_sizes(pair), pair.student_scale / heads,
                pair.band or 0, count, PAIRS=len(group), OF_ROWS=of_rows,
                **constants_of(pair, tiles, saved.mask is not None, causal), **options_of(tiles),
            )  # fmt: skip
            for k, gradient in zip(members, summed.to(x.dtype).unbind(), strict=True):
                found.setdefault(k, []).append(gradient)
    return [(found[k][0], found[k][1]) for k in range(len(pairs))]


def _log_sum_exps(
    group: list[LayerPair], side: str, mask: Tensor | None, bounds: Tensor | None, causal: bool
) -> Tensor:
    """Of the teacher ("t") or the student ("s"): maxima and logarithms of sums over them, [members, B, H, 2, L]."""
    pair = group[0]
    tq, tk, sq, sk = inputs_of(group)
    of_teacher = side == "t"
    q, k, scale = (pair.tq, pair.tk, pair.teacher_scale) if of_teacher else (pair.sq, pair.sk, pair.student_scale)
    batch, heads, length, width = q.shape
    tiles = listed(shared_memory(q), "forward", q.element_size(), width)
    count = triton.cdiv(length, tiles.rows)
    lse = torch.empty(len(group), batch, heads, 2, length, dtype=torch.float32, device=q.device)
    launch(
        lse_kernel, (batch * heads * count, len(group)), *((tq, tk) if of_teacher else (sq, sk)), either(mask, lse),
        either(bounds, lse), lse, *strides_of(q, k), batch, heads, length, heads // k.shape[1], width, scale * _LOG2_E,
        pair.band or 0, count, PAIRS=len(group),
        **_of_one(constants_of(pair, tiles, mask is not None, causal), side), **options_of(tiles),
    )  # fmt: skip
    return lse


def _of_one(constants: dict[str, Any], side: str) -> dict[str, Any]:
    """The constants of a kernel that reads one model."""
    renamed = {f"EVEN_{side.upper()}": "EVEN", f"{side.upper()}_BLOCK": "BLOCK"}
    shared = {"HAS_MASK", "CAUSAL", "BANDED", "ROWS", "KEYS", "PRECISION"}
    return {renamed.get(name, name): value for name, value in constants.items() if name in shared | renamed.keys()}


def _sizes(pair: LayerPair) -> tuple[Any, ...]:
    """Counts, widths, scales and logarithms of the numbers of heads, as the kernels of both models take them."""
    (batch, heads, length, s_width), (_, t_heads, _, t_width) = pair.sq.shape, pair.tq.shape
    groups = t_heads // pair.tk.shape[1], heads // pair.sk.shape[1]
    scales = pair.teacher_scale * _LOG2_E, pair.student_scale * _LOG2_E
    return batch, t_heads, heads, length, *groups, t_width, s_width, *scales, log2(t_heads), log2(heads)


def _tiles(kernel: str, pair: LayerPair) -> Tiles:
    """One size for all lengths: these kernels are more than those of single heads, and each build takes seconds."""
    size = max(pair.tq.element_size(), pair.sq.element_size())
    return listed(shared_memory(pair.sq), kernel, size, max(pair.tq.shape[3], pair.sq.shape[3]))


def aot_variants(shared: int) -> Iterator[Variant]:
    """Every entry of the table with the most work its kernel can have, and the common plain shape."""
    kernels: dict[str, Any] = {
        "lse": lse_kernel,
        "mean": head_mean_kernel,
        "mean dq": head_mean_gradient_kernel,
        "mean dk": head_mean_gradient_kernel,
    }
    for kernel, fn in kernels.items():
        for dtype, t_width, s_width, masked, band, pairs in (
            ("bf16", 64, 64, False, False, 1),
            ("bf16", 64, 64, True, True, 2),
            ("bf16", 64, 64, True, True, 6),
            ("bf16", 128, 128, True, True, 6),
            ("bf16", 128, 80, True, False, 1),
            ("bf16", 256, 256, True, True, 6),
            ("fp16", 64, 32, True, False, 1),
            ("fp32", 64, 64, True, True, 6),
            ("fp32", 128, 128, True, True, 6),
            ("fp32", 256, 256, True, True, 6),
        ):
            size = 4 if dtype == "fp32" else 2
            tiles = listed(shared, "forward" if kernel == "lse" else kernel, size, max(t_width, s_width))
            t, s = (torch.empty(1, 1, 1, width, device="meta") for width in (t_width, s_width))
            constants = constants_of(LayerPair(t, t, s, s, 1.0, 1.0, 7 if band else None), tiles, masked, band)
            if kernel == "lse":
                constants = _of_one(constants, "t")
            if kernel == "mean":
                constants["WITH_GRAD"] = True
            elif fn is head_mean_gradient_kernel:
                constants["OF_ROWS"] = kernel == "mean dq"
            constants |= {"PAIRS": pairs, "PRECISION": "ieee"}
            yield Variant(
                name="-".join(
                    ("head_mean", kernel.removeprefix("mean "), dtype, f"d{t_width}x{s_width}", f"K{pairs}")
                    + ("masked",) * masked
                    + ("band",) * band
                ),
                fn=fn,
                signature=_signature(fn, dtype, constants),
                constexprs=constants,
                options=options_of(tiles),
                expects_wgmma=size == 2 and (tiles.keys if kernel == "mean dk" else tiles.rows) >= 64,
                aligned=tuple(name for name in fn.arg_names if name[-2:] in ("_b", "_h", "_l")),
                pairs=pairs,
            )


def _signature(fn: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    known = dict.fromkeys(("q_ptr", "k_ptr", "tq_ptr", "tk_ptr", "sq_ptr", "sk_ptr"), f"*{dtype}")
    sums = ("partial_ptr", "change_ptr", "lse_ptr", "t_lse_ptr", "s_lse_ptr", "grad_ptr", "sum_ptr")
    known |= dict.fromkeys(sums, "*fp32") | {"mask_ptr": "*u8", "bounds_ptr": "*i32"}
    known |= dict.fromkeys(("scale", "t_scale", "s_scale", "t_log", "s_log", "grad_scale"), "fp32")
    return {name: known.get(name, "i32") for name in fn.arg_names if name not in constants}
