# mypy: allow-untyped-defs, allow-incomplete-defs
"""The programs of the layer-relevance KL: what one tile of queries and passages computes.

Everything is in base 2 (scores times log2 e), and KL sums are centred on the running maxima. With t and s the two
models' scores, delta = (t - m_t) - (s - m_s), which keeps full precision at any common offset.

Dimensions: K layer pairs, Q queries, P passages, D width.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Scores of passages left out, and where running maxima start: finite, and far enough apart that 2^(hidden - start) is 0.
_HIDDEN = tl.constexpr(-1e30)
_START = tl.constexpr(-1e20)
# Between any real score and a hidden one, at any temperature that leaves the hidden value finite.
_HIDDEN_BELOW = tl.constexpr(-1e19)
# What a share of the passages leaves behind per row: maximum and sum of each side, KL sum, sum at temperature 1, target.
_STATISTICS = tl.constexpr(7)
# Arguments that are not specialised: each value that is 1 or a multiple of 16 would be a build of its own.
_COUNTS = ["layers", "queries", "passages", "shares", "tiles_per_share", "first_layer", "chunk_start"]


@triton.jit
def _score_tile(
    q_ptr,
    d_ptr,
    q_inverse_ptr,
    d_inverse_ptr,
    layer,
    first_query,
    first_passage,
    queries,
    passages,
    width,
    COSINE: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products or cosines of a tile of one layer, in float32; rows past the end repeat the last and are hidden afterwards."""
    # A 64-bit scalar for where the tile lies and 32-bit offsets inside it: 64-bit offsets would fill the registers.
    query = tl.minimum(tl.arange(0, BLOCK_QUERIES), queries - 1 - first_query)
    passage = tl.minimum(tl.arange(0, BLOCK_PASSAGES), passages - 1 - first_passage)
    column = tl.arange(0, BLOCK_WIDTH)
    q_base = q_ptr + (layer * queries + first_query) * width + (query[:, None] * width + column[None, :])
    d_base = d_ptr + (layer * passages + first_passage) * width + (passage[None, :] * width + column[:, None])
    product = tl.zeros([BLOCK_QUERIES, BLOCK_PASSAGES], dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        if EVEN_WIDTH:
            q_tile = tl.load(q_base + start)
            d_tile = tl.load(d_base + start)
        else:
            q_tile = tl.load(q_base + start, mask=(column < width - start)[None, :], other=0.0)
            d_tile = tl.load(d_base + start, mask=(column < width - start)[:, None], other=0.0)
        product = tl.dot(q_tile, d_tile, product, input_precision=PRECISION)
    if COSINE:
        q_inverse = tl.load(q_inverse_ptr + layer * queries + first_query + query)
        d_inverse = tl.load(d_inverse_ptr + layer * passages + first_passage + passage)
        product = product * q_inverse[:, None] * d_inverse[None, :]
    return product


@triton.jit
def _hide(
    scores,
    mask_ptr,
    first_query,
    first_passage,
    target,
    queries,
    passages,
    mask_stride,
    HAS_MASK: tl.constexpr,
    EVEN_PASSAGES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr,
):
    """The scores with those of passages past the end, or masked and not the row's target, at the hidden value."""
    place = tl.arange(0, BLOCK_PASSAGES)
    if HAS_MASK:
        # Rows past the end repeat the last one. The mask's rows are padded, with zeros, to a multiple of the tile.
        query = tl.minimum(tl.arange(0, BLOCK_QUERIES), queries - 1 - first_query)
        base = mask_ptr + first_query.to(tl.int64) * mask_stride + first_passage
        kept = tl.load(base + (query[:, None] * mask_stride + place[None, :])) != 0
        kept = kept | (place[None, :] == (target - first_passage)[:, None])
        scores = tl.where(kept, scores, _HIDDEN)
    elif not EVEN_PASSAGES:
        scores = tl.where((place < passages - first_passage)[None, :], scores, _HIDDEN)
    return scores


@triton.jit(do_not_specialize=_COUNTS)
def scores_kernel(
    tq_ptr,
    td_ptr,
    sq_ptr,
    sd_ptr,
    tq_inverse_ptr,
    td_inverse_ptr,
    sq_inverse_ptr,
    sd_inverse_ptr,
    target_ptr,
    mask_ptr,
    maps_ptr,
    shares_ptr,
    queries,
    passages,
    teacher_width,
    student_width,
    map_stride,
    map_size,
    mask_stride,
    tiles_per_share,
    teacher_scale,
    student_scale,
    HAS_MASK: tl.constexpr,
    EVEN_PASSAGES: tl.constexpr,
    STORE: tl.constexpr,
    TEMPERED: tl.constexpr,
    TEACHER_COSINE: tl.constexpr,
    STUDENT_COSINE: tl.constexpr,
    EVEN_TEACHER: tl.constexpr,
    EVEN_STUDENT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One share of the passages for one tile of queries: statistics [K, shares, 7, Q]; the scores [2, K, Q, P] if
    requested."""
    # Neighbouring programs read the same passages for different queries.
    first_query = tl.program_id(0) * BLOCK_QUERIES
    share = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    target = tl.load(target_ptr + tl.minimum(query, queries - 1)).to(tl.int32)
    place = tl.arange(0, BLOCK_PASSAGES)

    max_r = tl.full([BLOCK_QUERIES], _START, dtype=tl.float32)
    max_t = tl.full([BLOCK_QUERIES], _START, dtype=tl.float32)
    max_s = tl.full([BLOCK_QUERIES], _START, dtype=tl.float32)
    sum_r = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    sum_t = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    sum_s = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    total = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    hit = tl.zeros([BLOCK_QUERIES], dtype=tl.float32)
    first = share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tl.cdiv(passages, BLOCK_PASSAGES))
    for tile in range(first, last):
        first_passage = tile * BLOCK_PASSAGES
        t = _score_tile(
            tq_ptr,
            td_ptr,
            tq_inverse_ptr,
            td_inverse_ptr,
            layer,
            first_query,
            first_passage,
            queries,
            passages,
            teacher_width,
            TEACHER_COSINE,
            EVEN_TEACHER,
            BLOCK_QUERIES,
            BLOCK_PASSAGES,
            BLOCK_WIDTH,
            PRECISION,
        )
        t *= _LOG2_E
        hit += tl.sum(tl.where(place[None, :] == (target - first_passage)[:, None], t, 0.0), axis=1)
        t = _hide(
            t,
            mask_ptr,
            first_query,
            first_passage,
            target,
            queries,
            passages,
            mask_stride,
            HAS_MASK,
            EVEN_PASSAGES,
            BLOCK_QUERIES,
            BLOCK_PASSAGES,
        )
        if TEMPERED:
            new_r = tl.maximum(max_r, tl.max(t, axis=1))
            sum_r = tl.exp2(max_r - new_r) * sum_r + tl.sum(tl.exp2(t - new_r[:, None]), axis=1)
            max_r = new_r
            t = t * teacher_scale
        s = _score_tile(
            sq_ptr,
            sd_ptr,
            sq_inverse_ptr,
            sd_inverse_ptr,
            layer,
            first_query,
            first_passage,
            queries,
            passages,
            student_width,
            STUDENT_COSINE,
            EVEN_STUDENT,
            BLOCK_QUERIES,
            BLOCK_PASSAGES,
            BLOCK_WIDTH,
            PRECISION,
        )
        # The same two roundings as the teacher's, so that identical models give identical scores.
        s = tl.where(t > _HIDDEN_BELOW, s * _LOG2_E * student_scale, _HIDDEN)
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

    base = shares_ptr + (layer * tl.num_programs(1) + share) * _STATISTICS * queries + query
    inside = query < queries
    tl.store(base, max_t, mask=inside)
    tl.store(base + queries, sum_t, mask=inside)
    tl.store(base + 2 * queries, max_s, mask=inside)
    tl.store(base + 3 * queries, sum_s, mask=inside)
    tl.store(base + 4 * queries, total, mask=inside)
    if TEMPERED:
        # One number does: the log-sum-exp of this share at temperature 1. NaN, which equals nothing, stays.
        tl.store(base + 5 * queries, tl.where(sum_r == 0, _HIDDEN, max_r + tl.log2(sum_r)), mask=inside)
    tl.store(base + 6 * queries, hit, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def combine_kernel(
    shares_ptr,
    lse_ptr,
    kl_ptr,
    nll_ptr,
    layers,
    queries,
    shares,
    TEMPERED: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """Merge the shares: log-sum-exps [2, K, Q] (base 2), and this block's part of the mean KL and NLL [K, blocks] (nats)."""
    layer = tl.program_id(0).to(tl.int64)
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    share = tl.arange(0, BLOCK_SHARES)
    base = shares_ptr + (layer * shares + share[:, None]) * _STATISTICS * queries + query[None, :]
    real = query < queries
    inside = (share < shares)[:, None] & real[None, :]
    max_t = tl.load(base, mask=inside, other=_START)
    sum_t = tl.load(base + queries, mask=inside, other=0.0)
    max_s = tl.load(base + 2 * queries, mask=inside, other=_START)
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
        lse_r = tl.load(base + 5 * queries, mask=inside, other=_HIDDEN)
        top_r = tl.max(lse_r, axis=0)
        lse_t = top_r + tl.log2(tl.sum(tl.exp2(lse_r - top_r[None, :]), axis=0))
    nll = tl.where(real, lse_t - hit, 0.0)
    place = layer * tl.num_programs(1) + tl.program_id(1)
    tl.store(kl_ptr + place, tl.sum(kl, axis=0) * _LN_2 / queries)
    tl.store(nll_ptr + place, tl.sum(nll, axis=0) * _LN_2 / queries)


@triton.jit
def _residual(t, s, lse_t, lse_s, RANGE: tl.constexpr):
    """R - P in float32, so that two nearly equal probabilities cancel before anything is rounded."""
    return (tl.exp2(s - lse_s) - tl.exp2(t - lse_t)) * RANGE


@triton.jit(do_not_specialize=_COUNTS)
def gradient_kernel(
    maps_ptr,
    lse_ptr,
    grad_ptr,
    sq_ptr,
    sd_ptr,
    sq_weight_ptr,
    sd_weight_ptr,
    dq_ptr,
    dd_ptr,
    layers,
    queries,
    passages,
    width,
    map_stride,
    map_size,
    RANGE: tl.constexpr,
    STUDENT_COSINE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both gradients in one launch from stored scores: the first programs make rows of dq, the others rows of dd."""
    layer = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = (column < width)[None, :]
    t_map = maps_ptr + layer * queries * map_stride
    s_map = t_map + map_size
    t_lse = lse_ptr + layer * queries
    s_lse = t_lse + layers * queries
    scale = tl.load(grad_ptr + layer) / RANGE
    query_tiles = tl.cdiv(queries, BLOCK_QUERIES)
    pid = tl.program_id(0)
    if pid < query_tiles:
        query = pid * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        real = query < queries
        lse_t = tl.load(t_lse + query, mask=real, other=0.0)[:, None]
        lse_s = tl.load(s_lse + query, mask=real, other=0.0)[:, None]
        if STUDENT_COSINE:
            q_weight = tl.load(sq_weight_ptr + layer * queries + query, mask=real, other=0.0)
        dq = tl.zeros([BLOCK_QUERIES, BLOCK_WIDTH], dtype=tl.float32)
        for start in range(0, passages, BLOCK_PASSAGES):
            passage = start + tl.arange(0, BLOCK_PASSAGES)
            place = query[:, None] * map_stride + passage[None, :]
            inside = real[:, None] & (passage < passages)[None, :]
            t = tl.load(t_map + place, mask=inside, other=_HIDDEN)
            s = tl.load(s_map + place, mask=inside, other=_HIDDEN)
            base = sd_ptr + layer * passages * width + (passage[:, None] * width + column[None, :])
            d_tile = tl.load(base, mask=(passage < passages)[:, None] & in_width, other=0.0)
            residual = _residual(t, s, lse_t, lse_s, RANGE)
            if STUDENT_COSINE:
                weight = tl.load(sd_weight_ptr + layer * passages + passage, mask=passage < passages, other=0.0)
                residual *= q_weight[:, None] * weight[None, :]
            residual = residual.to(d_tile.dtype)
            dq = tl.dot(residual, d_tile, dq, input_precision=PRECISION)
        base = dq_ptr + layer * queries * width + (query[:, None] * width + column[None, :])
        tl.store(base, (dq * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None] & in_width)
    else:
        passage = (pid - query_tiles) * BLOCK_PASSAGES + tl.arange(0, BLOCK_PASSAGES)
        real = passage < passages
        if STUDENT_COSINE:
            d_weight = tl.load(sd_weight_ptr + layer * passages + passage, mask=real, other=0.0)
        dd = tl.zeros([BLOCK_PASSAGES, BLOCK_WIDTH], dtype=tl.float32)
        for start in range(0, queries, BLOCK_QUERIES):
            query = start + tl.arange(0, BLOCK_QUERIES)
            lse_t = tl.load(t_lse + query, mask=query < queries, other=0.0)[None, :]
            lse_s = tl.load(s_lse + query, mask=query < queries, other=0.0)[None, :]
            place = query[None, :] * map_stride + passage[:, None]
            inside = real[:, None] & (query < queries)[None, :]
            t = tl.load(t_map + place, mask=inside, other=_HIDDEN)
            s = tl.load(s_map + place, mask=inside, other=_HIDDEN)
            base = sq_ptr + layer * queries * width + (query[:, None] * width + column[None, :])
            q_tile = tl.load(base, mask=(query < queries)[:, None] & in_width, other=0.0)
            residual = _residual(t, s, lse_t, lse_s, RANGE)
            if STUDENT_COSINE:
                weight = tl.load(sq_weight_ptr + layer * queries + query, mask=query < queries, other=0.0)
                residual *= d_weight[:, None] * weight[None, :]
            residual = residual.to(q_tile.dtype)
            dd = tl.dot(residual, q_tile, dd, input_precision=PRECISION)
        base = dd_ptr + layer * passages * width + (passage[:, None] * width + column[None, :])
        tl.store(base, (dd * scale).to(dd_ptr.dtype.element_ty), mask=real[:, None] & in_width)


@triton.jit(do_not_specialize=_COUNTS)
def residual_kernel(
    tq_ptr,
    td_ptr,
    sq_ptr,
    sd_ptr,
    tq_inverse_ptr,
    td_inverse_ptr,
    sq_inverse_ptr,
    sd_inverse_ptr,
    sq_weight_ptr,
    sd_weight_ptr,
    target_ptr,
    mask_ptr,
    lse_ptr,
    residual_ptr,
    layers,
    queries,
    passages,
    teacher_width,
    student_width,
    mask_stride,
    first_layer,
    chunk_start,
    chunk_passages,
    teacher_scale,
    student_scale,
    RANGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EVEN_PASSAGES: tl.constexpr,
    TEACHER_COSINE: tl.constexpr,
    STUDENT_COSINE: tl.constexpr,
    EVEN_TEACHER: tl.constexpr,
    EVEN_STUDENT: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute one tile of R - P of a chunk of passages: residual [chunk of K, Q, chunk of P]."""
    first_query = tl.program_id(0) * BLOCK_QUERIES
    first_passage = chunk_start + tl.program_id(1) * BLOCK_PASSAGES
    layer = (first_layer + tl.program_id(2)).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    row = tl.minimum(query, queries - 1)
    target = tl.load(target_ptr + row).to(tl.int32)
    t = _score_tile(
        tq_ptr,
        td_ptr,
        tq_inverse_ptr,
        td_inverse_ptr,
        layer,
        first_query,
        first_passage,
        queries,
        passages,
        teacher_width,
        TEACHER_COSINE,
        EVEN_TEACHER,
        BLOCK_QUERIES,
        BLOCK_PASSAGES,
        BLOCK_WIDTH,
        PRECISION,
    )
    t *= _LOG2_E
    t = _hide(
        t,
        mask_ptr,
        first_query,
        first_passage,
        target,
        queries,
        passages,
        mask_stride,
        HAS_MASK,
        EVEN_PASSAGES,
        BLOCK_QUERIES,
        BLOCK_PASSAGES,
    )
    s = _score_tile(
        sq_ptr,
        sd_ptr,
        sq_inverse_ptr,
        sd_inverse_ptr,
        layer,
        first_query,
        first_passage,
        queries,
        passages,
        student_width,
        STUDENT_COSINE,
        EVEN_STUDENT,
        BLOCK_QUERIES,
        BLOCK_PASSAGES,
        BLOCK_WIDTH,
        PRECISION,
    )
    t *= teacher_scale
    s = tl.where(t > _HIDDEN_BELOW, s * _LOG2_E * student_scale, _HIDDEN)
    lse_t = tl.load(lse_ptr + layer * queries + row)[:, None]
    lse_s = tl.load(lse_ptr + (layers + layer) * queries + row)[:, None]
    residual = _residual(t, s, lse_t, lse_s, RANGE)
    if STUDENT_COSINE:
        passage = tl.minimum(first_passage + tl.arange(0, BLOCK_PASSAGES), passages - 1)
        residual *= tl.load(sq_weight_ptr + layer * queries + row)[:, None]
        residual *= tl.load(sd_weight_ptr + layer * passages + passage)[None, :]
    residual = residual.to(residual_ptr.dtype.element_ty)
    place = tl.program_id(1) * BLOCK_PASSAGES + tl.arange(0, BLOCK_PASSAGES)
    base = residual_ptr + (tl.program_id(2).to(tl.int64) * queries + first_query) * chunk_passages
    offset = tl.arange(0, BLOCK_QUERIES)[:, None] * chunk_passages + place[None, :]
    tl.store(base + offset, residual, mask=(query < queries)[:, None] & (place < chunk_passages)[None, :])
