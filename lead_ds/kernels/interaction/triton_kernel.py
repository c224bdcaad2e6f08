# mypy: allow-untyped-defs, allow-incomplete-defs
"""The interaction divergence of a block of logits in one pass of a Triton kernel.

A query meets a passage in a product of full width (768, say), which a library computes at the speed of the chip. What
eager torch loses is the dozen passes over the maps that follow. One program reads a few rows of both maps, and writes
their divergence and the gradient of the student's logits.

Dimensions: G independent products, R query rows, N passages, L passage tokens.
"""

from collections.abc import Iterator
from math import e, log, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.launch import launch

MAX_LENGTH = 8192

_HIDDEN = tl.constexpr(-1e30)
_LN_2 = tl.constexpr(log(2))
_LOG2_E = log2(e)
# Lengths are rounded up to one of these, each a build of its own.
_BLOCKS = (32, 128, 512, 2048, MAX_LENGTH)
# Elements of a program and of a warp: few enough that both maps stay in registers.
_ELEMENTS, _WARP_ELEMENTS = 4096, 512


@triton.jit(do_not_specialize=["rows", "rows_a_product", "passages", "length"])
def map_kernel(
    t_ptr, s_ptr, mask_ptr, real_ptr, value_ptr, grad_ptr, rows, rows_a_product, passages, length, t_scale, s_scale,
    KL: tl.constexpr, HAS_MASK: tl.constexpr, WITH_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the maps [G, R, N, L] -> divergence [G, R, N] and d divergence / d student logit [G, R, N, L]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < rows
    visible = inside[:, None] & (column < length)[None, :]
    place = row[:, None] * length + column[None, :]
    t = tl.load(t_ptr + place, mask=visible, other=0.0) * t_scale
    s = tl.load(s_ptr + place, mask=visible, other=0.0) * s_scale
    stored = visible
    if HAS_MASK:
        passage = (row // rows_a_product) * passages + row % passages
        mask = tl.load(mask_ptr + passage[:, None] * length + column[None, :], mask=visible, other=0)
        visible = visible & (mask != 0)
    t = tl.where(visible, t, _HIDDEN)
    s = tl.where(visible, s, _HIDDEN)
    t = t - tl.max(t, axis=1)[:, None]
    s = s - tl.max(s, axis=1)[:, None]
    p = tl.exp2(t)
    r = tl.exp2(s)
    l_t = tl.sum(p, axis=1)
    l_s = tl.sum(r, axis=1)
    p = p / l_t[:, None]
    r = r / l_s[:, None]
    difference = r - p
    real = tl.load(real_ptr + row, mask=inside, other=0) != 0
    if KL:
        value = _LN_2 * (tl.sum(p * (t - s), axis=1) - (tl.log2(l_t) - tl.log2(l_s)))
        gradient = difference
    else:
        value = tl.sum(difference * difference, axis=1)
        gradient = 2.0 * r * (difference - tl.sum(r * difference, axis=1)[:, None])
    tl.store(value_ptr + row, tl.where(real, value, 0.0), mask=inside)
    if WITH_GRAD:
        gradient = tl.where(real[:, None] & visible, gradient, 0.0)
        tl.store(grad_ptr + place, gradient.to(grad_ptr.dtype.element_ty), mask=stored)


def divergence(
    teacher: Tensor,
    student: Tensor,
    scales: tuple[float, float],
    mask: Tensor | None,
    real: Tensor,
    kl: bool,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of the divergences of the real rows of float32 logits [G, R, N, L], and the logits' gradient, if a dtype is given.

    mask [G, N, L]: tokens that may be attended to; real [G, R, N]: rows that count.
    """
    products, query_rows, passages, length = student.shape
    rows = products * query_rows * passages
    values = torch.empty(rows, dtype=torch.float32, device=student.device)
    gradient = None if grad_dtype is None else torch.empty(student.shape, dtype=grad_dtype, device=student.device)
    block = next(size for size in _BLOCKS if length <= size)
    rows_here, warps = _tile(block)
    launch(
        map_kernel, (triton.cdiv(rows, rows_here),), teacher.contiguous(), student.contiguous(),
        values if mask is None else mask.contiguous().view(torch.uint8), real.contiguous().view(torch.uint8), values,
        values if gradient is None else gradient, rows, query_rows * passages, passages, length, scales[0] * _LOG2_E,
        scales[1] * _LOG2_E, KL=kl, HAS_MASK=mask is not None, WITH_GRAD=gradient is not None, ROWS=rows_here,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return values.sum(), gradient


def _tile(block: int) -> tuple[int, int]:
    """Rows and warps of a program."""
    rows = max(1, _ELEMENTS // block)
    return rows, rows * block // _WARP_ELEMENTS


def aot_variants(shared: int) -> Iterator[Variant]:
    """Short, usual and longest passages; bfloat16 and float32 gradients."""
    types = dict.fromkeys(("t_ptr", "s_ptr", "value_ptr"), "*fp32") | {"mask_ptr": "*u8", "real_ptr": "*u8"}
    types |= {"t_scale": "fp32", "s_scale": "fp32"}
    for kl in (True, False):
        for block, dtype in ((32, "bf16"), (512, "bf16"), (512, "fp32"), (MAX_LENGTH, "fp32")):
            rows, warps = _tile(block)
            constants = {"KL": kl, "HAS_MASK": True, "WITH_GRAD": True, "ROWS": rows, "BLOCK": block}
            known = types | {"grad_ptr": f"*{dtype}"}
            yield Variant(
                name=f"interaction-{'kl' if kl else 'mse'}-{dtype}-L{block}",
                fn=map_kernel,
                signature={name: known.get(name, "i32") for name in map_kernel.arg_names if name not in constants},
                constexprs=constants,
                options={"num_warps": warps, "num_stages": 1},
                expects_wgmma=False,
            )
