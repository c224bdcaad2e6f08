# mypy: allow-untyped-defs, allow-incomplete-defs
"""MaxSim in Triton: a forward kernel and two atomic-free backward kernels.

A query has too few tokens (32, say) to fill the 128-row tile that a tensor core instruction wants, so a tile packs as many
whole queries as fit, and a query longer than a tile is spread over several whose partial scores are added afterwards.
One flat loop runs over (passage, tile of its tokens, slice of the width), so that loads of the next passage are in flight
while the last one is reduced.

Dimensions: Q queries, P passages, l query tokens, m passage tokens, D width; R = Q * l query rows.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.dispatch import architecture, float32_dot_precision, processor_count, tiles_for
from lead_ds.kernels.layout import aligned
from lead_ds.kernels.maxsim.chunked import argmax_dtype

# A finite stand-in for minus infinity, and the line below which a maximum means "no token at all".
_NOTHING = tl.constexpr(-1e30)
_ANYTHING = tl.constexpr(-1e29)


class ForwardTiles(NamedTuple):
    """Query rows, passage tokens and width of a tile (width 0: the whole width stays resident), warps and stages."""

    rows: int
    tokens: int
    width: int
    warps: int
    stages: int


class ScatterTiles(NamedTuple):
    """Passage tokens, query rows and width of a tile of the passage-gradient product, warps and stages."""

    tokens: int
    rows: int
    width: int
    warps: int
    stages: int


# By element size and by what the kernel does. With a resident query tile ("whole width") two programs share a
# multiprocessor, so that one's maxima hide behind the other's products; that takes at most 128 registers a thread, which
# searching for the winner keeps only with half as many tokens a tile.
_FORWARD: dict[int, dict[tuple[int, str], ForwardTiles]] = {
    80: {
        (2, "whole"): ForwardTiles(128, 64, 0, 4, 3),
        (2, "whole, argmax"): ForwardTiles(128, 64, 0, 8, 2),
        (2, "sliced"): ForwardTiles(128, 128, 32, 8, 3),
        (2, "sliced, argmax"): ForwardTiles(128, 64, 32, 8, 3),
        (4, "sliced"): ForwardTiles(64, 64, 32, 8, 2),
        (4, "sliced, argmax"): ForwardTiles(64, 64, 32, 8, 2),
    },
    90: {
        (2, "whole"): ForwardTiles(128, 128, 0, 8, 2),
        (2, "whole, argmax"): ForwardTiles(128, 64, 0, 8, 3),
        (2, "sliced"): ForwardTiles(128, 256, 64, 8, 3),
        (2, "sliced, argmax"): ForwardTiles(128, 128, 64, 8, 4),
        (4, "sliced"): ForwardTiles(64, 64, 32, 8, 2),
        (4, "sliced, argmax"): ForwardTiles(64, 64, 32, 8, 2),
    },
}
_SCATTER: dict[int, dict[int, ScatterTiles]] = {
    80: {2: ScatterTiles(128, 32, 128, 8, 3), 4: ScatterTiles(64, 32, 64, 8, 2)},
    90: {2: ScatterTiles(128, 64, 128, 8, 3), 4: ScatterTiles(64, 32, 64, 8, 2)},
}
# The gather of winners: query rows and passages at once. Their product is the number of rows in flight.
_GATHER_ROWS, _GATHER_PASSAGES, _GATHER_WARPS = 4, 32, 8
_WHOLE_WIDTH = 128


@triton.jit
def forward_kernel(
    q_ptr,
    d_ptr,
    q_mask_ptr,
    d_mask_ptr,
    scores_ptr,
    argmax_ptr,
    queries,
    passages,
    length_q,
    length_d,
    width,
    row_tiles,
    pack,
    parts,
    group,
    HAS_Q_MASK: tl.constexpr,
    HAS_D_MASK: tl.constexpr,
    SAVE_ARGMAX: tl.constexpr,
    EVEN_TOKENS: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of query rows against `group` passages; scores [parts, Q, P], argmax [P, R]."""
    # Neighbouring programs share a group of passages, which the first of them brings into the L2 cache.
    tile = tl.program_id(0) % row_tiles
    first_passage = (tl.program_id(0) // row_tiles) * group
    last_passage = tl.minimum(first_passage + group, passages)

    row = tl.arange(0, BLOCK_ROWS)
    tokens_here = tl.minimum(length_q, BLOCK_ROWS)
    lane = row // tokens_here
    first_query = (tile // parts) * pack
    query = first_query + lane
    token = (tile % parts) * BLOCK_ROWS + row % tokens_here
    row_in_q = query * length_q + token
    real = (lane < pack) & (query < queries) & (token < length_q)
    counted = real
    if HAS_Q_MASK:
        counted = real & (tl.load(q_mask_ptr + row_in_q, mask=real, other=0) != 0)

    column = tl.arange(0, BLOCK_WIDTH)
    offset = tl.arange(0, BLOCK_TOKENS)
    q_base = q_ptr + row_in_q.to(tl.int64)[:, None] * width + column[None, :]
    # The place inside a tile does not change: only a scalar moves along the loop.
    in_tile = offset[None, :] * width + column[:, None]
    if RESIDENT:
        q_tile = tl.load(q_base, mask=counted[:, None] & (column[None, :] < width), other=0.0)
        slices = 1
    else:
        slices = tl.cdiv(width, BLOCK_WIDTH)
    token_tiles = tl.cdiv(length_d, BLOCK_TOKENS)

    product = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    best = tl.full([BLOCK_ROWS], _NOTHING, dtype=tl.float32)
    winner = tl.full([BLOCK_ROWS], -1, dtype=tl.int32)
    for step in range((last_passage - first_passage) * token_tiles * slices):
        piece = step % slices
        place = step // slices
        passage = first_passage + place // token_tiles
        first_token = (place % token_tiles) * BLOCK_TOKENS
        passage_token = first_token + offset
        first_row = passage.to(tl.int64) * length_d + first_token
        d_base = d_ptr + first_row * width + in_tile
        if RESIDENT:
            if EVEN_TOKENS and EVEN_WIDTH:
                d_tile = tl.load(d_base)
            else:
                d_tile = tl.load(
                    d_base, mask=(passage_token[None, :] < length_d) & (column[:, None] < width), other=0.0
                )
        else:
            start = piece * BLOCK_WIDTH
            if EVEN_WIDTH:
                q_tile = tl.load(q_base + start, mask=counted[:, None], other=0.0)
                if EVEN_TOKENS:
                    d_tile = tl.load(d_base + start)
                else:
                    d_tile = tl.load(d_base + start, mask=passage_token[None, :] < length_d, other=0.0)
            else:
                left = width - start
                q_tile = tl.load(q_base + start, mask=counted[:, None] & (column[None, :] < left), other=0.0)
                d_tile = tl.load(
                    d_base + start, mask=(passage_token[None, :] < length_d) & (column[:, None] < left), other=0.0
                )
        product = tl.dot(q_tile, d_tile, product, input_precision=PRECISION)

        if piece == slices - 1:
            similarity = product
            if HAS_D_MASK:
                valid = tl.load(d_mask_ptr + first_row + offset, mask=passage_token < length_d, other=0) != 0
                similarity = tl.where(valid[None, :], similarity, _NOTHING)
            elif not EVEN_TOKENS:
                similarity = tl.where((passage_token < length_d)[None, :], similarity, _NOTHING)
            if SAVE_ARGMAX:
                top, at = tl.max(similarity, axis=1, return_indices=True)
                winner = tl.where(top > best, first_token + at, winner)
            else:
                top = tl.max(similarity, axis=1)
            best = tl.maximum(best, top)
            product = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)

            if place % token_tiles == token_tiles - 1:
                won = counted & (best > _ANYTHING)
                gained = tl.where(won, best, 0.0)
                score_base = scores_ptr + (tile % parts).to(tl.int64) * queries * passages + passage
                if LANES == 1:
                    tl.store(score_base + first_query.to(tl.int64) * passages, tl.sum(gained, axis=0))
                else:
                    lanes = tl.arange(0, LANES)
                    total = tl.sum(tl.where(lane[:, None] == lanes[None, :], gained[:, None], 0.0), axis=0)
                    inside = (lanes < pack) & (first_query + lanes < queries)
                    tl.store(score_base + (first_query + lanes).to(tl.int64) * passages, total, mask=inside)
                if SAVE_ARGMAX:
                    argmax_row = argmax_ptr + passage.to(tl.int64) * queries * length_q + row_in_q
                    tl.store(argmax_row, tl.where(won, winner, -1).to(argmax_ptr.dtype.element_ty), mask=real)
                best = tl.full([BLOCK_ROWS], _NOTHING, dtype=tl.float32)
                winner = tl.full([BLOCK_ROWS], -1, dtype=tl.int32)


@triton.jit
def query_gradient_kernel(
    grad_ptr,
    d_ptr,
    argmax_ptr,
    dq_ptr,
    passages,
    rows,
    length_q,
    length_d,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """dq[r] = sum over passages of g[q(r), p] d[p, argmax[p, r]]: a weighted gather, summed in a fixed order."""
    flat = tl.arange(0, BLOCK_PASSAGES * BLOCK_ROWS)
    row = tl.program_id(0) * BLOCK_ROWS + flat % BLOCK_ROWS
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    query = (row // length_q).to(tl.int64)
    total = tl.zeros([BLOCK_PASSAGES * BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
    for start in range(0, passages, BLOCK_PASSAGES):
        passage = (start + flat // BLOCK_ROWS).to(tl.int64)
        inside = (row < rows) & (passage < passages)
        winner = tl.load(argmax_ptr + passage * rows + row, mask=inside, other=-1).to(tl.int32)
        weight = tl.load(grad_ptr + query * passages + passage, mask=inside, other=0.0)
        d_row = d_ptr + (passage * length_d + winner)[:, None] * width
        d_tile = tl.load(d_row + column[None, :], mask=(winner >= 0)[:, None] & (column < width)[None, :], other=0.0)
        total += weight[:, None] * d_tile.to(tl.float32)
    summed = tl.sum(tl.reshape(total, [BLOCK_PASSAGES, BLOCK_ROWS, BLOCK_WIDTH]), axis=0)
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = dq_ptr + out_row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, summed.to(dq_ptr.dtype.element_ty), mask=(out_row < rows)[:, None] & (column < width)[None, :])


@triton.jit
def passage_gradient_kernel(
    grad_ptr,
    q_ptr,
    argmax_ptr,
    scale_ptr,
    dd_ptr,
    passages,
    rows,
    length_q,
    length_d,
    width,
    token_tiles,
    HAS_SCALE: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dd[p, m] = sum over query rows of [argmax[p, r] = m] g[q(r), p] q[r], as a matrix product: no atomics."""
    passage = (tl.program_id(0) // token_tiles).to(tl.int64)
    token = (tl.program_id(0) % token_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    offset = tl.arange(0, BLOCK_ROWS)
    in_tile = offset[:, None] * width + column[None, :]
    total = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], dtype=tl.float32)
    for block in range(tl.cdiv(rows, BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        row = start + offset
        inside = row < rows
        winner = tl.load(argmax_ptr + passage * rows + row, mask=inside, other=-1).to(tl.int32)
        weight = tl.load(grad_ptr + (row // length_q).to(tl.int64) * passages + passage, mask=inside, other=0.0)
        q_base = q_ptr + start.to(tl.int64) * width + in_tile
        if EVEN_WIDTH:
            q_tile = tl.load(q_base, mask=inside[:, None], other=0.0)
        else:
            q_tile = tl.load(q_base, mask=inside[:, None] & (column < width)[None, :], other=0.0)
        weight = weight.to(q_tile.dtype)
        chosen = tl.where(winner[None, :] == token[:, None], weight[None, :], tl.zeros_like(weight)[None, :])
        total = tl.dot(chosen, q_tile, total, input_precision=PRECISION)
    if HAS_SCALE:
        total *= tl.load(scale_ptr)
    out = dd_ptr + (passage * length_d + token)[:, None] * width + column[None, :]
    tl.store(out, total.to(dd_ptr.dtype.element_ty), mask=(token < length_d)[:, None] & (column < width)[None, :])


class _Plan(NamedTuple):
    """How query rows are laid on tiles: `pack` whole queries a tile, or one query over `parts` tiles."""

    pack: int
    parts: int
    row_tiles: int
    lanes: int


def forward(
    q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, save_argmax: bool
) -> tuple[Tensor, Tensor]:
    """Scores [Q, P] and, if asked, the winning token of every query row [P, R] (-1 = none); else an empty tensor."""
    queries, length_q, width = q.shape
    passages, length_d, _ = d.shape
    shape = (passages, queries * length_q) if save_argmax else (0,)
    argmax = torch.empty(shape, dtype=argmax_dtype(length_d), device=q.device)
    if queries * passages * length_q * length_d == 0:
        return torch.zeros(queries, passages, dtype=torch.float32, device=q.device), argmax.fill_(-1)
    q, d = aligned(q), aligned(d)
    width = q.shape[2]
    tiles = _forward_tiles(architecture(q), q.element_size(), width, queries * length_q, length_d, save_argmax)
    plan = _plan(queries, length_q, tiles.rows)
    scores = torch.empty(plan.parts, queries, passages, dtype=torch.float32, device=q.device)
    # About eight programs a multiprocessor: enough to even out the last wave, few enough to keep the query tile loaded.
    group = min(passages, max(1, plan.row_tiles * passages // (8 * processor_count(q))))
    constants = _forward_constants(
        tiles, plan.lanes, width, length_d, q_mask is not None, d_mask is not None, save_argmax
    )
    forward_kernel[(plan.row_tiles * triton.cdiv(passages, group),)](
        q,
        d,
        _bytes(q_mask, q),
        _bytes(d_mask, d),
        scores,
        argmax if save_argmax else scores,
        queries,
        passages,
        length_q,
        length_d,
        width,
        plan.row_tiles,
        plan.pack,
        plan.parts,
        group,
        **constants,
        PRECISION=float32_dot_precision(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return scores[0] if plan.parts == 1 else scores.sum(dim=0), argmax


def backward(grad: Tensor, q: Tensor, d: Tensor, q_mask: Tensor | None, argmax: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and d from the winners: two kernels, each summing in a fixed order."""
    queries, length_q, width = q.shape
    passages, length_d, _ = d.shape
    rows = queries * length_q
    if rows * passages * length_d * width == 0:
        return torch.zeros_like(q), torch.zeros_like(d)
    grad = grad.contiguous()
    # A weight of 0 does not silence a NaN in the padding.
    q, d = aligned(q if q_mask is None else q.masked_fill(~q_mask[..., None], 0)), aligned(d)
    given_width, width = width, q.shape[2]
    dq, dd = torch.empty_like(q), torch.empty_like(d)
    block_width = min(128, triton.next_power_of_2(width))
    query_gradient_kernel[(triton.cdiv(rows, _GATHER_ROWS), triton.cdiv(width, block_width))](
        grad,
        d,
        argmax,
        dq,
        passages,
        rows,
        length_q,
        length_d,
        width,
        BLOCK_ROWS=_GATHER_ROWS,
        BLOCK_PASSAGES=_GATHER_PASSAGES,
        BLOCK_WIDTH=block_width,
        num_warps=_GATHER_WARPS,
    )
    weight, scale = _in_range(grad, q.dtype)
    tiles = _scatter_tiles(architecture(q), q.element_size(), width, length_d)
    token_tiles = triton.cdiv(length_d, tiles.tokens)
    passage_gradient_kernel[(token_tiles * passages, triton.cdiv(width, tiles.width))](
        weight,
        q,
        argmax,
        scale,
        dd,
        passages,
        rows,
        length_q,
        length_d,
        width,
        token_tiles,
        **_scatter_constants(tiles, width, scaled=scale is not weight),
        PRECISION=float32_dot_precision(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dq[..., :given_width].contiguous(), dd[..., :given_width].contiguous()


def _in_range(grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights that float16 can hold, and what to multiply the product by; the weights themselves for other dtypes."""
    if dtype != torch.float16:
        return grad, grad
    # A power of two, so that scaling there and back is exact; computed on the device, without a synchronisation.
    scale = torch.exp2(torch.frexp(grad.abs().amax()).exponent.to(torch.float32))
    return grad / scale, scale


def _bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    """A boolean mask as bytes, or any tensor in the place of an argument that the kernel will not read."""
    return unused if mask is None else mask.contiguous().view(torch.uint8)


def _plan(queries: int, length_q: int, rows: int) -> _Plan:
    pack = min(max(1, rows // length_q), queries)
    parts = triton.cdiv(length_q, rows)
    return _Plan(pack, parts, triton.cdiv(queries, pack) * parts, triton.next_power_of_2(pack))


def _forward_tiles(capability: int, size: int, width: int, rows: int, length_d: int, save_argmax: bool) -> ForwardTiles:
    whole = size == 2 and width <= _WHOLE_WIDTH
    tiles = tiles_for(_FORWARD, capability)[
        size, ("whole" if whole else "sliced") + (", argmax" if save_argmax else "")
    ]
    if whole:
        tiles = tiles._replace(width=triton.next_power_of_2(width))
    # Tiles far larger than the problem would mostly compute padding; 64 is the least that wgmma takes.
    tokens = max(64, triton.next_power_of_2(length_d))
    return tiles._replace(rows=64 if rows <= 64 else tiles.rows, tokens=min(tiles.tokens, tokens))


def _forward_constants(
    tiles: ForwardTiles, lanes: int, width: int, length_d: int, has_q_mask: bool, has_d_mask: bool, save_argmax: bool
) -> dict[str, Any]:
    return {
        "HAS_Q_MASK": has_q_mask,
        "HAS_D_MASK": has_d_mask,
        "SAVE_ARGMAX": save_argmax,
        "EVEN_TOKENS": length_d % tiles.tokens == 0,
        "EVEN_WIDTH": width % tiles.width == 0,
        "RESIDENT": width <= tiles.width,
        "LANES": lanes,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_WIDTH": tiles.width,
    }


def _scatter_tiles(capability: int, size: int, width: int, length_d: int) -> ScatterTiles:
    tiles = tiles_for(_SCATTER, capability)[size]
    tokens = max(64, triton.next_power_of_2(length_d))
    return tiles._replace(
        tokens=min(tiles.tokens, tokens), width=min(tiles.width, max(16, triton.next_power_of_2(width)))
    )


def _scatter_constants(tiles: ScatterTiles, width: int, scaled: bool) -> dict[str, Any]:
    return {
        "HAS_SCALE": scaled,
        "EVEN_WIDTH": width % tiles.width == 0,
        "BLOCK_TOKENS": tiles.tokens,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_WIDTH": tiles.width,
    }


def aot_variants() -> Iterator[Variant]:
    """Every tile configuration of the Hopper table, on the shapes that select it."""
    counts = dict.fromkeys(("queries", "passages", "rows", "length_q", "length_d", "width", "row_tiles"), "i32")
    counts |= dict.fromkeys(("pack", "parts", "group", "token_tiles"), "i32")
    for dtype, size in {"bf16": 2, "fp16": 2, "fp32": 4}.items():
        pointers = dict.fromkeys(("q_ptr", "d_ptr", "dq_ptr", "dd_ptr"), f"*{dtype}")
        pointers |= dict.fromkeys(("scores_ptr", "grad_ptr", "scale_ptr"), "*fp32")
        pointers |= {"q_mask_ptr": "*u8", "d_mask_ptr": "*u8", "argmax_ptr": "*i16"}

        def variant(fn: Any, name: str, constexprs: dict[str, Any], warps: int, stages: int, dots: bool) -> Variant:
            return Variant(
                name=f"maxsim-{name}",
                fn=fn,
                signature={key: kind for key, kind in (pointers | counts).items() if key in fn.arg_names},  # noqa: B023
                constexprs=constexprs,
                options={"num_warps": warps, "num_stages": stages},
                expects_wgmma=dots and size == 2,  # noqa: B023
                aligned=("width",),
            )

        # float16 takes the tiles of bfloat16: one width shows that it compiles as well.
        for width in (128,) if dtype == "fp16" else (64, 128, 768, 1008):
            for queries, length_d, masked in ((64, 256, False), (64, 180, True), (2, 64, True)):
                for save in (False, True):
                    tiles = _forward_tiles(90, size, width, queries * 32, length_d, save)
                    lanes = _plan(queries, 32, tiles.rows).lanes
                    constants = _forward_constants(tiles, lanes, width, length_d, masked, masked, save)
                    constants["PRECISION"] = "ieee"
                    name = f"forward{'-argmax' if save else ''}{'-masked' if masked else ''}"
                    name += f"-{dtype}-q{queries}-m{length_d}-d{width}"
                    yield variant(forward_kernel, name, constants, tiles.warps, tiles.stages, True)
            scatter = _scatter_tiles(90, size, width, 256)
            constants = {**_scatter_constants(scatter, width, scaled=dtype == "fp16"), "PRECISION": "ieee"}
            name = f"passage-gradient-{dtype}-d{width}"
            yield variant(passage_gradient_kernel, name, constants, scatter.warps, scatter.stages, True)
            constants = {"BLOCK_ROWS": _GATHER_ROWS, "BLOCK_PASSAGES": _GATHER_PASSAGES}
            constants["BLOCK_WIDTH"] = min(128, triton.next_power_of_2(width))
            yield variant(query_gradient_kernel, f"query-gradient-{dtype}-d{width}", constants, _GATHER_WARPS, 3, False)
