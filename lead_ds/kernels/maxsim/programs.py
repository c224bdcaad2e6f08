# mypy: allow-untyped-defs, allow-incomplete-defs
"""The programs of MaxSim: a forward kernel and two atomic-free backward kernels.

A query has too few tokens (32, say) to fill the 128-row tile that a tensor core instruction wants, so a tile packs as
many whole queries as fit. A query longer than a tile is spread over several whose partial scores are added afterwards.
One flat loop runs over (passage, tile of its tokens, slice of the width), so that loads of the next passage are in
flight while the last one is reduced.

With HAS_SCALES every token's products are multiplied by its scale: 1 / length makes them cosines. Counts and lengths are
not specialised: they differ from batch to batch, and each value that is 1 or a multiple of 16 would be a build of its own.

Dimensions: Q queries, P passages, l query tokens, m passage tokens, D width; R = Q * l query rows.
"""

import triton
import triton.language as tl

from lead_ds.kernels.builds import interpreted

# A finite stand-in for minus infinity, and the line below which a maximum means "no token at all".
_NOTHING = tl.constexpr(-1e30)
_ANYTHING = tl.constexpr(-1e29)
# The interpreter reduces by a function of ours element by element, which takes it minutes.
_INTERPRETED = tl.constexpr(interpreted())

_COUNTS = ["queries", "passages", "rows", "length_q", "length_d", "row_tiles", "pack", "parts", "group", "token_tiles"]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger_first(a, i, b, j):
    keep = (a > b) | ((a == b) & (i < j))
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), tl.where(keep, i, j)


@triton.jit
def row_max(x, INTERPRETED: tl.constexpr):
    """Maximum of every row, NaN where there is one: `tl.max` would drop it, and a broken model would train on."""
    if INTERPRETED:
        broken = tl.max((x != x).to(tl.int32), axis=1) > 0
        return tl.where(broken, float("nan"), tl.max(tl.where(x != x, _NOTHING, x), axis=1))
    else:
        return tl.reduce(x, 1, _larger)


@triton.jit
def row_argmax(x, column, INTERPRETED: tl.constexpr):
    """The same and the first column that holds it; any column in a row with NaN."""
    if INTERPRETED:
        _, at = tl.max(tl.where(x != x, _NOTHING, x), axis=1, return_indices=True)
        return row_max(x, INTERPRETED), at
    else:
        return tl.reduce((x, tl.broadcast_to(column[None, :], x.shape)), 1, _larger_first)


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    q_ptr, d_ptr, q_mask_ptr, d_mask_ptr, q_scale_ptr, d_scale_ptr, scores_ptr, argmax_ptr, queries, passages,
    length_q, length_d, width, row_tiles, pack, parts, group, HAS_Q_MASK: tl.constexpr, HAS_D_MASK: tl.constexpr,
    HAS_SCALES: tl.constexpr, SAVE_ARGMAX: tl.constexpr, EVEN_WIDTH: tl.constexpr, RESIDENT: tl.constexpr,
    LANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
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
            d_tile = tl.load(d_base, mask=(passage_token[None, :] < length_d) & (column[:, None] < width), other=0.0)
        else:
            start = piece * BLOCK_WIDTH
            if EVEN_WIDTH:
                q_tile = tl.load(q_base + start, mask=counted[:, None], other=0.0)
                d_tile = tl.load(d_base + start, mask=passage_token[None, :] < length_d, other=0.0)
            else:
                inside = (start + column) < width
                q_tile = tl.load(q_base + start, mask=counted[:, None] & inside[None, :], other=0.0)
                d_tile = tl.load(d_base + start, mask=(passage_token[None, :] < length_d) & inside[:, None], other=0.0)
        product = tl.dot(q_tile, d_tile, product, input_precision=PRECISION)

        if piece == slices - 1:
            similarity = product
            if HAS_SCALES:
                scale = tl.load(d_scale_ptr + first_row + offset, mask=passage_token < length_d, other=0.0)
                similarity = similarity * scale[None, :]
            visible = passage_token < length_d
            if HAS_D_MASK:
                visible = tl.load(d_mask_ptr + first_row + offset, mask=visible, other=0) != 0
            similarity = tl.where(visible[None, :], similarity, _NOTHING)
            if SAVE_ARGMAX:
                top, at = row_argmax(similarity, offset, _INTERPRETED)
                # In a row with NaN any token may be named, but one that is there.
                at = tl.minimum(first_token + at, length_d - 1)
                winner = tl.where(top <= best, winner, at)
            else:
                top = row_max(similarity, _INTERPRETED)
            best = tl.maximum(best, top, propagate_nan=tl.PropagateNan.ALL)
            product = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)

            if place % token_tiles == token_tiles - 1:
                # Written so that NaN counts as won.
                won = counted & ((best <= _ANYTHING) == 0)
                gained = tl.where(won, best, 0.0)
                if HAS_SCALES:
                    gained *= tl.load(q_scale_ptr + row_in_q, mask=counted, other=0.0)
                score_base = scores_ptr + (tile % parts).to(tl.int64) * queries * passages + passage
                lanes = tl.arange(0, LANES)
                total = tl.sum(tl.where(lane[:, None] == lanes[None, :], gained[:, None], 0.0), axis=0)
                owned = (lanes < pack) & (first_query + lanes < queries)
                tl.store(score_base + (first_query + lanes).to(tl.int64) * passages, total, mask=owned)
                if SAVE_ARGMAX:
                    argmax_row = argmax_ptr + passage.to(tl.int64) * queries * length_q + row_in_q
                    tl.store(argmax_row, tl.where(won, winner, -1).to(argmax_ptr.dtype.element_ty), mask=real)
                best = tl.full([BLOCK_ROWS], _NOTHING, dtype=tl.float32)
                winner = tl.full([BLOCK_ROWS], -1, dtype=tl.int32)


@triton.jit(do_not_specialize=_COUNTS)
def query_gradient_kernel(
    grad_ptr, d_ptr, argmax_ptr, q_scale_ptr, d_scale_ptr, dq_ptr, passages, rows, length_q, length_d, width,
    HAS_SCALES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PASSAGES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
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
        if HAS_SCALES:
            weight *= tl.load(d_scale_ptr + passage * length_d + winner, mask=winner >= 0, other=0.0)
        d_row = d_ptr + (passage * length_d + winner)[:, None] * width
        d_tile = tl.load(d_row + column[None, :], mask=(winner >= 0)[:, None] & (column < width)[None, :], other=0.0)
        # A row without a winner adds nothing, even where its weight is not a number.
        total += tl.where(winner >= 0, weight, 0.0)[:, None] * d_tile.to(tl.float32)
    summed = tl.sum(tl.reshape(total, [BLOCK_PASSAGES, BLOCK_ROWS, BLOCK_WIDTH]), axis=0)
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if HAS_SCALES:
        summed *= tl.load(q_scale_ptr + out_row, mask=out_row < rows, other=0.0)[:, None]
    out = dq_ptr + out_row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, summed.to(dq_ptr.dtype.element_ty), mask=(out_row < rows)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def passage_gradient_kernel(
    grad_ptr, q_ptr, argmax_ptr, q_scale_ptr, d_scale_ptr, scale_ptr, dd_ptr, passages, rows, length_q, length_d,
    width, token_tiles, HAS_SCALES: tl.constexpr, HAS_RANGE: tl.constexpr, EVEN_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
        if HAS_SCALES:
            weight *= tl.load(q_scale_ptr + row, mask=inside, other=0.0)
        q_base = q_ptr + start.to(tl.int64) * width + in_tile
        if EVEN_WIDTH:
            q_tile = tl.load(q_base, mask=inside[:, None], other=0.0)
        else:
            q_tile = tl.load(q_base, mask=inside[:, None] & (column < width)[None, :], other=0.0)
        weight = weight.to(q_tile.dtype)
        chosen = tl.where(winner[None, :] == token[:, None], weight[None, :], tl.zeros_like(weight)[None, :])
        total = tl.dot(chosen, q_tile, total, input_precision=PRECISION)
    if HAS_RANGE:
        total *= tl.load(scale_ptr)
    if HAS_SCALES:
        here = passage * length_d + token
        total *= tl.load(d_scale_ptr + here, mask=token < length_d, other=0.0)[:, None]
    out = dd_ptr + (passage * length_d + token)[:, None] * width + column[None, :]
    tl.store(out, total.to(dd_ptr.dtype.element_ty), mask=(token < length_d)[:, None] & (column < width)[None, :])
