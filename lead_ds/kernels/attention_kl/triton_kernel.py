"""Launching the Triton attention KL: tiles, groups of layer pairs that share a launch, and what is kept for the backward.

Dimensions: K pairs, B texts, H heads, L tokens, d width of a head.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import e, log, log2
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.attention_kl.inputs import LayerPair
from lead_ds.kernels.attention_kl.programs import (
    bounds_kernel,
    forward_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from lead_ds.kernels.attention_kl.tiles import MAX_WIDTH, Tiles, listed
from lead_ds.kernels.dispatch import float32_dot_precision, shared_memory
from lead_ds.kernels.launch import launch

_ATOMIC_WIDTH = 128
_SHORT = 32
# Tokens that the bounds of a mask are read by.
_BOUNDS_BLOCK = 256

_LN_2 = log(2)
_LOG2_E = log2(e)


class Group(NamedTuple):
    """Layer pairs of one launch, and their log-sum-exps [members, B, H, L] in base 2."""

    members: list[int]
    t_lse: Tensor
    s_lse: Tensor


class Saved(NamedTuple):
    """What the backward needs in addition to q and k: log-sum-exps, the mask and its bounds, and 1 / the number of real
    rows."""

    groups: list[Group]
    mask: Tensor | None
    bounds: Tensor | None
    weight: Tensor


def supported(pairs: list[LayerPair]) -> bool:
    """Whether the kernels take these head dimensions."""
    return all(max(pair.tq.shape[3], pair.sq.shape[3]) <= MAX_WIDTH for pair in pairs)


def forward(pairs: list[LayerPair], mask: Tensor | None, causal: bool) -> tuple[Tensor, Saved]:
    """KL of every pair [K], and what the backward needs."""
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
        pair, heads = group[0], group[0].sq.shape[1]
        tiles = _tiles("forward", pair, length)
        row_tiles = triton.cdiv(length, tiles.rows)
        partial = torch.empty(len(group), batch * heads * row_tiles, dtype=torch.float32, device=device)
        t_lse = torch.empty(len(group), batch, heads, length, dtype=torch.float32, device=device)
        s_lse = torch.empty_like(t_lse)
        launch(
            forward_kernel, (batch * heads * row_tiles, len(group)), *inputs_of(group), either(mask, partial),
            either(bounds, partial), partial, t_lse, s_lse, *strides_of(pair.tq, pair.tk, pair.sq, pair.sk), *_sizes(pair),
            pair.teacher_scale * _LOG2_E, pair.student_scale * _LOG2_E, pair.band or 0, row_tiles, PAIRS=len(group),
            **constants_of(pair, tiles, mask is not None, causal), **options_of(tiles),
        )  # fmt: skip
        groups.append(Group(members, t_lse, s_lse))
        for k, value in zip(members, (partial.sum(1) * (weight * (_LN_2 / heads))).unbind(), strict=True):
            values[k] = value
    return torch.stack(values), Saved(groups, mask, bounds, weight)


def backward(
    grad: Tensor, pairs: list[LayerPair], saved: Saved, causal: bool, atomic: bool
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of every pair's student q and k; `grad` [K]."""
    gradients = [(_dense(torch.empty_like(pair.sq)), _dense(torch.empty_like(pair.sk))) for pair in pairs]
    if not saved.groups:
        return [(dq.zero_(), dk.zero_()) for dq, dk in gradients]
    batch, _, length, _ = pairs[0].sq.shape
    # Wider heads leave one kernel with both gradients too few registers.
    atomic = atomic and all(max(pair.tq.shape[3], pair.sq.shape[3]) <= _ATOMIC_WIDTH for pair in pairs)
    mask, bounds = saved.mask, saved.bounds
    grad = (grad.to(torch.float32) * saved.weight).contiguous()
    for members, t_lse, s_lse in saved.groups:
        group = [pairs[k] for k in members]
        pair, heads = group[0], group[0].sq.shape[1]
        group_grad = grad if len(group) == len(pairs) else torch.stack([grad[k] for k in members])
        arguments = (either(mask, t_lse), either(bounds, t_lse), group_grad, t_lse, s_lse)
        strides = strides_of(pair.tq, pair.tk, pair.sq, pair.sk)
        scales = (pair.teacher_scale * _LOG2_E, pair.student_scale * _LOG2_E, pair.student_scale / heads)
        if atomic:
            summed = torch.zeros(len(group), *pair.sq.shape, dtype=torch.float32, device=pair.sq.device)
        else:
            summed = t_lse
            tiles = _tiles("dq", pair, length)
            row_tiles = triton.cdiv(length, tiles.rows)
            launch(
                query_gradient_kernel, (batch * heads * row_tiles, len(group)), *inputs_of(group),
                pointers([gradients[k][0] for k in members]), *arguments, *strides,
                *strides_of(gradients[members[0]][0]), *_sizes(pair), *scales, pair.band or 0, row_tiles,
                PAIRS=len(group), **constants_of(pair, tiles, mask is not None, causal), **options_of(tiles),
            )  # fmt: skip
        tiles = _tiles("both" if atomic else "dk", pair, length)
        key_tiles = triton.cdiv(length, tiles.keys)
        launch(
            key_gradient_kernel, (batch * pair.sk.shape[1] * key_tiles, len(group)), *inputs_of(group),
            pointers([gradients[k][1] for k in members]), summed, *arguments, *strides,
            *strides_of(gradients[members[0]][1]), *_sizes(pair), *scales, pair.band or 0, key_tiles, PAIRS=len(group),
            ATOMIC=atomic, **constants_of(pair, tiles, mask is not None, causal), **options_of(tiles),
        )  # fmt: skip
        if atomic:
            for k, dq in zip(members, summed.unbind(), strict=True):
                gradients[k][0].copy_(dq)
    return gradients


def dense(pair: LayerPair) -> LayerPair:
    """The pair with copies of those tensors whose heads' vectors are not contiguous."""
    return replace(pair, tq=_dense(pair.tq), tk=_dense(pair.tk), sq=_dense(pair.sq), sk=_dense(pair.sk))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def mask_facts(
    mask: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The mask as bytes, its bounds [B, 4] and 1 / the number of real rows, all without a synchronisation."""
    if mask is None:
        return None, None, torch.full((), 1.0 / (batch * length), device=device)
    mask = (mask.to(device) != 0).contiguous().view(torch.uint8)
    bounds = torch.empty(batch, 4, dtype=torch.int32, device=device)
    launch(bounds_kernel, (batch,), mask, bounds, length, BLOCK=_BOUNDS_BLOCK, num_warps=4)
    return mask, bounds, bounds[:, 3].sum().clamp_min(1).to(torch.float32).reciprocal()


def groups_of(pairs: list[LayerPair]) -> list[list[int]]:
    """Indices of pairs that can share a launch: equal shapes, strides, dtypes, scales and band."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, pair in enumerate(pairs):
        alike = tuple((x.shape, x.stride(), x.dtype) for x in (pair.tq, pair.tk, pair.sq, pair.sk))
        groups.setdefault((alike, pair.teacher_scale, pair.student_scale, pair.band), []).append(k)
    return list(groups.values())


def pointers(tensors: list[Tensor]) -> Any:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def inputs_of(group: list[LayerPair]) -> list[Any]:
    return [pointers([getattr(pair, name) for pair in group]) for name in ("tq", "tk", "sq", "sk")]


def either(tensor: Tensor | None, unused: Tensor) -> Tensor:
    return unused if tensor is None else tensor


def strides_of(*tensors: Tensor) -> list[int]:
    return [tensor.stride(dim) for tensor in tensors for dim in range(3)]


def _sizes(pair: LayerPair) -> tuple[int, ...]:
    batch, heads, length, s_width = pair.sq.shape
    return batch, heads, length, heads // pair.tk.shape[1], heads // pair.sk.shape[1], pair.tq.shape[3], s_width


def _tiles(kernel: str, pair: LayerPair, length: int) -> Tiles:
    size = max(pair.tq.element_size(), pair.sq.element_size())
    return _fitted(shared_memory(pair.sq), kernel, size, max(pair.tq.shape[3], pair.sq.shape[3]), length)


def _fitted(shared: int, kernel: str, size: int, width: int, length: int) -> Tiles:
    """Tiles of the table; for texts of up to 32 tokens smaller ones. Two sizes, so that lengths cost two builds at most."""
    tiles = listed(shared, kernel, size, width)
    return tiles if length > _SHORT else tiles._replace(rows=min(tiles.rows, _SHORT), keys=min(tiles.keys, _SHORT))


def constants_of(pair: LayerPair, tiles: Tiles, masked: bool, causal: bool) -> dict[str, Any]:
    t_width, s_width = pair.tq.shape[3], pair.sq.shape[3]
    t_block, s_block = (max(16, triton.next_power_of_2(width)) for width in (t_width, s_width))
    return {
        "HAS_MASK": masked,
        "CAUSAL": causal,
        "BANDED": pair.band is not None,
        "EVEN_T": t_width == t_block,
        "EVEN_S": s_width == s_block,
        "ROWS": tiles.rows,
        "KEYS": tiles.keys,
        "T_BLOCK": t_block,
        "S_BLOCK": s_block,
        "PRECISION": float32_dot_precision(),
    }


def options_of(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


def aot_variants(shared: int) -> Iterator[Variant]:
    """Every entry of the table with the most work its kernel can have, and the common plain shape."""
    kernels: dict[str, Any] = {
        "forward": forward_kernel,
        "dq": query_gradient_kernel,
        "dk": key_gradient_kernel,
        "both": key_gradient_kernel,
    }
    for kernel, fn in kernels.items():
        for dtype, t_width, s_width, length, masked, band, pairs in (
            ("bf16", 64, 64, 512, False, False, 1),
            ("bf16", 64, 64, 512, True, True, 1),
            ("bf16", 64, 64, 512, True, True, 2),
            ("bf16", 64, 64, 512, True, True, 6),
            ("bf16", 64, 64, 32, True, False, 6),
            ("bf16", 128, 128, 512, True, True, 6),
            ("bf16", 128, 80, 512, True, False, 1),
            ("bf16", 256, 256, 512, True, True, 6),
            ("fp16", 64, 32, 512, True, False, 1),
            ("fp32", 64, 64, 512, True, True, 6),
            ("fp32", 128, 128, 512, True, True, 6),
            ("fp32", 256, 256, 512, True, True, 6),
        ):
            if kernel == "both" and t_width > _ATOMIC_WIDTH:
                continue
            size = 4 if dtype == "fp32" else 2
            tiles = _fitted(shared, kernel, size, max(t_width, s_width), length)
            q = [torch.empty(1, 1, length, width, device="meta") for width in (t_width, s_width)]
            pair = LayerPair(q[0], q[0], q[1], q[1], 1.0, 1.0, 7 if band else None)
            constants = constants_of(pair, tiles, masked, band) | {"PAIRS": pairs, "PRECISION": "ieee"}
            if fn is key_gradient_kernel:
                constants["ATOMIC"] = kernel == "both"
            name = f"attention_kl-{kernel}-{dtype}-d{t_width}x{s_width}-L{length}-K{pairs}"
            yield Variant(
                name=name + ("-masked" if masked else "") + ("-band" if band else ""),
                fn=fn,
                signature=_signature(fn, dtype, constants),
                constexprs=constants,
                options=options_of(tiles),
                expects_wgmma=size == 2 and min(tiles.rows, tiles.keys) >= 64,
                aligned=tuple(name for name in fn.arg_names if name[2:] in ("_b", "_h", "_l")),
                pairs=pairs,
            )


def _signature(fn: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    known = dict.fromkeys(("tq_ptr", "tk_ptr", "sq_ptr", "sk_ptr", "dk_ptr", "dq_ptr"), f"*{dtype}")
    known |= dict.fromkeys(("partial_ptr", "t_lse_ptr", "s_lse_ptr", "grad_ptr"), "*fp32")
    known |= {"mask_ptr": "*u8", "bounds_ptr": "*i32"}
    known |= dict.fromkeys(("t_scale", "s_scale", "grad_scale"), "fp32")
    if fn is key_gradient_kernel:
        known["dq_ptr"] = "*fp32"
    return {name: known.get(name, "i32") for name in fn.arg_names if name not in constants}
