# mypy: allow-untyped-defs, allow-incomplete-defs
"""The forward programs of the layer-relevance KL: a share of the passages for a tile of queries; the shares, merged.

Dimensions: K layer pairs, Q queries, P passages, D width.
"""

import triton
import triton.language as tl

from lead_ds.kernels.layer_kl.score_tiles import (
    COUNTS,
    HIDDEN,
    HIDDEN_BELOW,
    LN_2,
    LOG2_E,
    START,
    STATISTICS,
    hide,
    score_tile,
)


@triton.jit(do_not_specialize=COUNTS)
def scores_kernel(
    tq_ptr, td_ptr, sq_ptr, sd_ptr, tq_inverse_ptr, td_inverse_ptr, sq_inverse_ptr, sd_inverse_ptr, target_ptr,
    mask_ptr, maps_ptr, shares_ptr, queries, passages, teacher_width, student_width, map_stride, map_size,
    mask_stride, tiles_per_share, teacher_scale, student_scale, HAS_MASK: tl.constexpr, EVEN_PASSAGES: tl.constexpr,
    STORE: tl.constexpr, TEMPERED: tl.constexpr, TEACHER_SCALED: tl.constexpr, STUDENT_SCALED: tl.constexpr,
    EVEN_TEACHER: tl.constexpr, EVEN_STUDENT: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the passages for one tile of queries: statistics [K, shares, 7, Q]; the scores [2, K, Q, P] if
    requested."""
    # Neighbouring programs read the same passages for different queries.
    first_query = tl.program_id(0) * BLOCK_QUERIES
    share = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    target = tl.load(target_ptr + tl.minimum(query, queries - 1)).to(tl.int32)
    place = tl.arange(0, BLOCK_PASSAGES)

    max_r = tl.full([BLOCK_QUERIES], START, dtype=tl.float32)
    max_t = tl.full([BLOCK_QUERIES], START, dtype=tl.float32)
    max_s = tl.full([BLOCK_QUERIES], START, dtype=tl.float32)
    sum_r = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    sum_t = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    sum_s = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    total = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    hit = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    first = share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tl.cdiv(passages, BLOCK_PASSAGES))
    for tile in range(first, last):
        first_passage = tile * BLOCK_PASSAGES
        t = score_tile(
            tq_ptr, td_ptr, tq_inverse_ptr, td_inverse_ptr, layer, first_query, first_passage, queries, passages,
            teacher_width, TEACHER_SCALED, EVEN_TEACHER, BLOCK_QUERIES, BLOCK_PASSAGES, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
        t *= LOG2_E
        hit += tl.sum(tl.where(place[None, :] == (target - first_passage)[:, None], t, 0.0), axis=1)
        t = hide(
            t, mask_ptr, first_query, first_passage, target, queries, passages, mask_stride, HAS_MASK, EVEN_PASSAGES,
            BLOCK_QUERIES, BLOCK_PASSAGES,
        )  # fmt: skip
        if TEMPERED:
            new_r = tl.maximum(max_r, tl.max(t, axis=1))
            sum_r = tl.exp2(max_r - new_r) * sum_r + tl.sum(tl.exp2(t - new_r[:, None]), axis=1)
            max_r = new_r
            t = t * teacher_scale
        s = score_tile(
            sq_ptr, sd_ptr, sq_inverse_ptr, sd_inverse_ptr, layer, first_query, first_passage, queries, passages,
            student_width, STUDENT_SCALED, EVEN_STUDENT, BLOCK_QUERIES, BLOCK_PASSAGES, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
        # The same two roundings as the teacher's, so that identical models give identical scores.
        s = tl.where(t > HIDDEN_BELOW, s * LOG2_E * student_scale, HIDDEN)
        if STORE:
            # To the end of the padded row: nothing uninitialised is handed on.
            inside = (query < queries)[:, None] & (place < map_stride - first_passage)[None, :]
            offset = tl.arange(0, BLOCK_QUERIES)[:, None] * map_stride + place[None, :]
            base = maps_ptr + (layer * queries + first_query) * map_stride + first_passage
            tl.store(base + offset, t, mask=inside)
            tl.store(base + map_size + offset, s, mask=inside)

        new_t = tl.maximum(max_t, tl.max(t, axis=1))
        new_s = tl.maximum(max_s, tl.max(s, axis=1))
        t = t - new_t[:, None]
        s = s - new_s[:, None]
        weight = tl.exp2(t)
        decay = tl.exp2(max_t - new_t)
        total = decay * (total + sum_t * ((max_t - new_t) - (max_s - new_s))) + tl.sum(weight * (t - s), axis=1)
        sum_t = decay * sum_t + tl.sum(weight, axis=1)
        sum_s = tl.exp2(max_s - new_s) * sum_s + tl.sum(tl.exp2(s), axis=1)
        max_t, max_s = new_t, new_s

    base = shares_ptr + (layer * tl.num_programs(1) + share) * STATISTICS * queries + query
    inside = query < queries
    tl.store(base, max_t, mask=inside)
    tl.store(base + queries, sum_t, mask=inside)
    tl.store(base + 2 * queries, max_s, mask=inside)
    tl.store(base + 3 * queries, sum_s, mask=inside)
    tl.store(base + 4 * queries, total, mask=inside)
    if TEMPERED:
        # One number does: the log-sum-exp of this share at temperature 1. NaN, which equals nothing, stays.
        tl.store(base + 5 * queries, tl.where(sum_r == 0, HIDDEN, max_r + tl.log2(sum_r)), mask=inside)
    tl.store(base + 6 * queries, hit, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    shares_ptr, lse_ptr, kl_ptr, nll_ptr, layers, queries, shares, TEMPERED: tl.constexpr, BLOCK_SHARES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """Merge the shares: log-sum-exps [2, K, Q] (base 2), and this block's part of the mean KL and NLL [K, blocks] (nats)."""
    layer = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    share = tl.arange(0, BLOCK_SHARES)
    base = shares_ptr + (layer * shares + share[:, None]) * STATISTICS * queries + query[None, :]
    real = query < queries
    inside = (share < shares)[:, None] & real[None, :]
    max_t = tl.load(base, mask=inside, other=START)
    sum_t = tl.load(base + queries, mask=inside, other=0.0)
    max_s = tl.load(base + 2 * queries, mask=inside, other=START)
    sum_s = tl.load(base + 3 * queries, mask=inside, other=0.0)
    total = tl.load(base + 4 * queries, mask=inside, other=0.0)
    hit = tl.sum(tl.load(base + 6 * queries, mask=inside, other=0.0), axis=0)

    top_t = tl.max(max_t, axis=0)
    top_s = tl.max(max_s, axis=0)
    shift_t = max_t - top_t[None, :]
    shift_s = max_s - top_s[None, :]
    all_total = tl.sum(tl.exp2(shift_t) * (total + sum_t * (shift_t - shift_s)), axis=0)
    all_t = tl.where(real, tl.sum(tl.exp2(shift_t) * sum_t, axis=0), 1.0)
    all_s = tl.where(real, tl.sum(tl.exp2(shift_s) * sum_s, axis=0), 1.0)
    lse_t = top_t + tl.log2(all_t)
    tl.store(lse_ptr + layer * queries + query, lse_t, mask=real)
    tl.store(lse_ptr + (layers + layer) * queries + query, top_s + tl.log2(all_s), mask=real)
    kl = tl.where(real, all_total / all_t - tl.log2(all_t) + tl.log2(all_s), 0.0)
    if TEMPERED:
        lse_r = tl.load(base + 5 * queries, mask=inside, other=HIDDEN)
        top_r = tl.max(lse_r, axis=0)
        lse_t = top_r + tl.log2(tl.sum(tl.exp2(lse_r - top_r[None, :]), axis=0))
    nll = tl.where(real, lse_t - hit, 0.0)
    place = layer * tl.num_programs(1) + tl.program_id(1)
    tl.store(kl_ptr + place, tl.sum(kl, axis=0) * LN_2 / queries)
    tl.store(nll_ptr + place, tl.sum(nll, axis=0) * LN_2 / queries)
