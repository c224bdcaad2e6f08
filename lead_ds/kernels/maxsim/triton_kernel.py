"""Launching MaxSim in Triton: tiles, how queries are laid on them, and what is handed to the kernels."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.dispatch import float32_dot_precision, processor_count, shared_memory, tiles_for
from lead_ds.kernels.launch import launch
from lead_ds.kernels.maxsim.chunked import argmax_dtype
from lead_ds.kernels.maxsim.programs import forward_kernel, passage_gradient_kernel, query_gradient_kernel
from lead_ds.kernels.maxsim.tiles import FORWARD, SCATTER, ForwardTiles, ScatterTiles
from lead_ds.kernels.vectors import aligned, inverse_lengths, through_lengths

# The gather of winners: query rows and passages at once (half as many with lengths). Their product is the rows in flight.
_GATHER_ROWS, _GATHER_PASSAGES, _GATHER_WARPS = 4, 32, 8
_WHOLE_WIDTH = 128


# Whole queries that share a tile, at most: a number of the build, so that lengths of queries need none of their own.
_LANES = 8


class _Tiling(NamedTuple):
    """How query rows are laid on tiles: `pack` whole queries a tile, or one query over `parts` tiles."""

    pack: int
    parts: int
    row_tiles: int


def forward(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, cosine: bool, save_argmax: bool
) -> tuple[Tensor, Tensor]:
    """Scores [Q, P] and, if requested, the winning token of every query row [P, R] (-1 = none); else an empty tensor."""
    queries, length_q, width = q.shape
    passages, length_d, _ = d.shape
    shape = (passages, queries * length_q) if save_argmax else (0,)
    argmax = torch.empty(shape, dtype=argmax_dtype(length_d), device=q.device)
    if queries * passages * length_q * length_d == 0:
        return torch.zeros(queries, passages, dtype=torch.float32, device=q.device), argmax.fill_(-1)
    q, d = aligned(q), aligned(d)
    width = q.shape[2]
    tiles = _forward_tiles(shared_memory(q), q.element_size(), width, save_argmax)
    tiling = _tiling(queries, length_q, tiles.rows)
    scores = torch.empty(tiling.parts, queries, passages, dtype=torch.float32, device=q.device)
    # About eight programs a multiprocessor: enough to even out the last wave, few enough to keep the query tile loaded.
    group = min(passages, max(1, tiling.row_tiles * passages // (8 * processor_count(q))))
    launch(
        forward_kernel, (tiling.row_tiles * triton.cdiv(passages, group),), q, d, _bytes(q_mask, q), _bytes(d_mask, d),
        inverse_lengths(q) if cosine else scores, inverse_lengths(d) if cosine else scores, scores,
        argmax if save_argmax else scores, queries, passages, length_q, length_d, width, tiling.row_tiles, tiling.pack,
        tiling.parts, group, **_forward_constants(tiles, width), HAS_Q_MASK=q_mask is not None,
        HAS_D_MASK=d_mask is not None, HAS_SCALES=cosine, SAVE_ARGMAX=save_argmax, PRECISION=float32_dot_precision(),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return scores[0] if tiling.parts == 1 else scores.sum(dim=0), argmax


def backward(
    grad: Tensor, q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, argmax: Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of q and d from the winners: two kernels, each summing in a fixed order."""
    queries, length_q, width = q.shape
    passages, length_d, _ = d.shape
    rows = queries * length_q
    if rows * passages * length_d * width == 0:
        return torch.zeros_like(q), torch.zeros_like(d)
    grad, argmax = grad.contiguous(), argmax.contiguous()
    # A weight of 0 does not silence a NaN in the padding.
    q, d = aligned(q if q_mask is None else q.masked_fill(~q_mask[..., None], 0)), aligned(d)
    given_width, width = width, q.shape[2]
    # Cosines: both gradients are finished in float32, after the kernels.
    gradient_dtype = torch.float32 if cosine else q.dtype
    dq, dd = torch.empty_like(q, dtype=gradient_dtype), torch.empty_like(d, dtype=gradient_dtype)
    q_scale, d_scale = (inverse_lengths(q), inverse_lengths(d)) if cosine else (grad, grad)
    block_width = min(128, triton.next_power_of_2(width))
    launch(
        query_gradient_kernel, (triton.cdiv(rows, _GATHER_ROWS), triton.cdiv(width, block_width)), grad, d, argmax,
        q_scale, d_scale, dq, passages, rows, length_q, length_d, width, HAS_SCALES=cosine, BLOCK_ROWS=_GATHER_ROWS,
        BLOCK_PASSAGES=_GATHER_PASSAGES // (1 + cosine), BLOCK_WIDTH=block_width, num_warps=_GATHER_WARPS,
    )  # fmt: skip
    weight, range_ = _in_range(grad, q.dtype, q_scale if cosine else None)
    tiles = _scatter_tiles(shared_memory(q), q.element_size(), width)
    token_tiles = triton.cdiv(length_d, tiles.tokens)
    launch(
        passage_gradient_kernel, (token_tiles * passages, triton.cdiv(width, tiles.width)), weight, q, argmax,
        q_scale, d_scale, range_, dd, passages, rows, length_q, length_d, width, token_tiles,
        **_scatter_constants(tiles, width), HAS_SCALES=cosine, HAS_RANGE=range_ is not weight,
        PRECISION=float32_dot_precision(), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if cosine:
        dq = through_lengths(dq, q, q_scale)
        dd = through_lengths(dd, d, d_scale)
        dd = dd if d_mask is None else dd.masked_fill_(~d_mask[..., None], 0)
    return dq[..., :given_width].contiguous(), dd[..., :given_width].contiguous()


def _in_range(grad: Tensor, dtype: torch.dtype, q_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights that float16 can hold, and what to multiply the product by; the weights themselves for other dtypes."""
    if dtype != torch.float16:
        return grad, grad
    largest = grad.abs().amax() if q_scale is None else grad.abs().amax() * q_scale.amax()
    # A power of two, so that scaling there and back is exact; computed on the device, without a synchronisation.
    scale = torch.exp2(torch.frexp(largest).exponent.to(torch.float32))
    return grad / scale, scale


def _bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    """A boolean mask as bytes, or any tensor in the place of an argument that the kernel will not read."""
    return unused if mask is None else mask.contiguous().view(torch.uint8)


def _tiling(queries: int, length_q: int, rows: int) -> _Tiling:
    pack = min(max(1, rows // length_q), queries, _LANES)
    parts = triton.cdiv(length_q, rows)
    return _Tiling(pack, parts, triton.cdiv(queries, pack) * parts)


def _forward_tiles(shared: int, size: int, width: int, save_argmax: bool) -> ForwardTiles:
    whole = size == 2 and width <= _WHOLE_WIDTH
    kind = ("whole" if whole else "sliced") + (", argmax" if save_argmax else "")
    tiles = tiles_for(FORWARD, shared)[size, kind]
    return tiles._replace(width=triton.next_power_of_2(width)) if whole else tiles


def _forward_constants(tiles: ForwardTiles, width: int) -> dict[str, Any]:
    return {
        "EVEN_WIDTH": width % tiles.width == 0,
        "RESIDENT": width <= tiles.width,
        "LANES": _LANES,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_WIDTH": tiles.width,
    }


def _scatter_tiles(shared: int, size: int, width: int) -> ScatterTiles:
    tiles = tiles_for(SCATTER, shared)[size]
    return tiles._replace(width=min(tiles.width, max(16, triton.next_power_of_2(width))))


def _scatter_constants(tiles: ScatterTiles, width: int) -> dict[str, Any]:
    return {
        "EVEN_WIDTH": width % tiles.width == 0,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_WIDTH": tiles.width,
    }


def aot_variants(shared: int) -> Iterator[Variant]:
    """Every tile configuration for so much shared memory a block, on the shapes that select it."""
    counts = dict.fromkeys(("queries", "passages", "rows", "length_q", "length_d", "width", "row_tiles"), "i32")
    counts |= dict.fromkeys(("pack", "parts", "group", "token_tiles"), "i32")
    for dtype, size in {"bf16": 2, "fp16": 2, "fp32": 4}.items():
        pointers = dict.fromkeys(("q_ptr", "d_ptr"), f"*{dtype}")
        floats = ("scores_ptr", "grad_ptr", "scale_ptr", "q_scale_ptr", "d_scale_ptr")
        pointers |= dict.fromkeys(floats, "*fp32")
        pointers |= {"q_mask_ptr": "*u8", "d_mask_ptr": "*u8", "argmax_ptr": "*i16"}

        def variant(fn: Any, name: str, constexprs: dict[str, Any], tiles: tuple[int, int], dots: bool) -> Variant:
            known = pointers | counts  # noqa: B023
            known |= dict.fromkeys(("dq_ptr", "dd_ptr"), "*fp32" if constexprs["HAS_SCALES"] else known["q_ptr"])
            return Variant(
                name=f"maxsim-{name}{'-cosine' if constexprs['HAS_SCALES'] else ''}",
                fn=fn,
                signature={key: kind for key, kind in known.items() if key in fn.arg_names},
                constexprs=constexprs,
                options={"num_warps": tiles[0], "num_stages": tiles[1]},
                expects_wgmma=dots and size == 2,  # noqa: B023
                aligned=("width",),
            )

        # float16 takes the tiles of bfloat16: one width shows that it compiles as well.
        for width in (128,) if dtype == "fp16" else (64, 128, 768, 1008):
            for masked, cosine in ((False, False), (True, True)):
                switches = {"HAS_Q_MASK": masked, "HAS_D_MASK": masked, "HAS_SCALES": cosine, "PRECISION": "ieee"}
                for save in (False, True):
                    tiles = _forward_tiles(shared, size, width, save)
                    constants = _forward_constants(tiles, width) | switches | {"SAVE_ARGMAX": save}
                    name = f"forward{'-argmax' if save else ''}{'-masked' if masked else ''}-{dtype}-d{width}"
                    yield variant(forward_kernel, name, constants, tiles[3:], True)
                scatter = _scatter_tiles(shared, size, width)
                constants = _scatter_constants(scatter, width) | {"PRECISION": "ieee"}
                constants |= {"HAS_SCALES": cosine, "HAS_RANGE": dtype == "fp16"}
                yield variant(
                    passage_gradient_kernel, f"passage-gradient-{dtype}-d{width}", constants, scatter[3:], True
                )
                constants = {
                    "BLOCK_ROWS": _GATHER_ROWS,
                    "BLOCK_PASSAGES": _GATHER_PASSAGES // (1 + cosine),
                    "HAS_SCALES": cosine,
                }
                constants["BLOCK_WIDTH"] = min(128, triton.next_power_of_2(width))
                name = f"query-gradient-{dtype}-d{width}"
                yield variant(query_gradient_kernel, name, constants, (_GATHER_WARPS, 3), False)
