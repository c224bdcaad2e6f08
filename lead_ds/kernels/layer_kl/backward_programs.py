# mypy: allow-untyped-defs, allow-incomplete-defs
"""The backward programs of the layer-relevance KL: both gradients of stored scores, or residuals of recomputed ones.

Dimensions: K layer pairs, Q queries, P passages, D width.
"""

import triton
import triton.language as tl

from lead_ds.kernels.layer_kl.score_tiles import COUNTS, HIDDEN, HIDDEN_BELOW, LOG2_E, hide, score_tile


@triton.jit
def _residual(t, s, lse_t, lse_s, RANGE: tl.constexpr):
    """R - P in float32, so that two nearly equal probabilities cancel before anything is rounded."""
    return (tl.exp2(s - lse_s) - tl.exp2(t - lse_t)) * RANGE


@triton.jit
def _gradient_rows(
    tile, layer, column, in_width, t_map, s_map, t_lse, s_lse, scale, other_ptr, row_weight_ptr, other_weight_ptr,
    out_ptr, rows, others, width, row_stride, other_stride, OF_QUERIES: tl.constexpr, RANGE: tl.constexpr,
    STUDENT_SCALED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows of dq, whose others are the passages, or of dd, whose others are the queries."""
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < rows
    if OF_QUERIES:
        lse_t = tl.load(t_lse + row, mask=real, other=0.0)[:, None]
        lse_s = tl.load(s_lse + row, mask=real, other=0.0)[:, None]
    if STUDENT_SCALED:
        row_weight = tl.load(row_weight_ptr + layer * rows + row, mask=real, other=0.0)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
    for start in range(0, others, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        if not OF_QUERIES:
            lse_t = tl.load(t_lse + other, mask=other < others, other=0.0)[None, :]
            lse_s = tl.load(s_lse + other, mask=other < others, other=0.0)[None, :]
        place = row[:, None] * row_stride + other[None, :] * other_stride
        inside = real[:, None] & (other < others)[None, :]
        t = tl.load(t_map + place, mask=inside, other=HIDDEN)
        s = tl.load(s_map + place, mask=inside, other=HIDDEN)
        base = other_ptr + layer * others * width + (other[:, None] * width + column[None, :])
        features = tl.load(base, mask=(other < others)[:, None] & in_width, other=0.0)
        residual = _residual(t, s, lse_t, lse_s, RANGE)
        if STUDENT_SCALED:
            weight = tl.load(other_weight_ptr + layer * others + other, mask=other < others, other=0.0)
            residual *= row_weight[:, None] * weight[None, :]
        total = tl.dot(residual.to(features.dtype), features, total, input_precision=PRECISION)
    base = out_ptr + layer * rows * width + (row[:, None] * width + column[None, :])
    tl.store(base, (total * scale).to(out_ptr.dtype.element_ty), mask=real[:, None] & in_width)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    maps_ptr, lse_ptr, grad_ptr, sq_ptr, sd_ptr, sq_weight_ptr, sd_weight_ptr, dq_ptr, dd_ptr, layers, queries,
    passages, width, map_stride, map_size, RANGE: tl.constexpr, STUDENT_SCALED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_PASSAGES: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    # A function: what one branch names may not have another shape in the other.
    if pid < query_tiles:
        _gradient_rows(
            pid, layer, column, in_width, t_map, s_map, t_lse, s_lse, scale, sd_ptr, sq_weight_ptr, sd_weight_ptr, dq_ptr,
            queries, passages, width, map_stride, 1, True, RANGE, STUDENT_SCALED, BLOCK_QUERIES, BLOCK_PASSAGES,
            BLOCK_WIDTH, PRECISION,
        )  # fmt: skip
    else:
        _gradient_rows(
            pid - query_tiles, layer, column, in_width, t_map, s_map, t_lse, s_lse, scale, sq_ptr, sd_weight_ptr,
            sq_weight_ptr, dd_ptr, passages, queries, width, 1, map_stride, False, RANGE, STUDENT_SCALED, BLOCK_PASSAGES,
            BLOCK_QUERIES, BLOCK_WIDTH, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def residual_kernel(
    tq_ptr, td_ptr, sq_ptr, sd_ptr, tq_inverse_ptr, td_inverse_ptr, sq_inverse_ptr, sd_inverse_ptr, sq_weight_ptr,
    sd_weight_ptr, target_ptr, mask_ptr, lse_ptr, residual_ptr, layers, queries, passages, teacher_width,
    student_width, mask_stride, first_layer, chunk_start, chunk_passages, teacher_scale, student_scale,
    RANGE: tl.constexpr, HAS_MASK: tl.constexpr, EVEN_PASSAGES: tl.constexpr, TEACHER_SCALED: tl.constexpr,
    STUDENT_SCALED: tl.constexpr, EVEN_TEACHER: tl.constexpr, EVEN_STUDENT: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_PASSAGES: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Recompute one tile of R - P of a chunk of passages: residual [chunk of K, Q, chunk of P]."""
    first_query = tl.program_id(0) * BLOCK_QUERIES
    first_passage = chunk_start + tl.program_id(1) * BLOCK_PASSAGES
    layer = (first_layer + tl.program_id(2)).to(tl.int64)
    query = first_query + tl.arange(0, BLOCK_QUERIES)
    row = tl.minimum(query, queries - 1)
    target = tl.load(target_ptr + row).to(tl.int32)
    t = score_tile(
        tq_ptr, td_ptr, tq_inverse_ptr, td_inverse_ptr, layer, first_query, first_passage, queries, passages,
        teacher_width, TEACHER_SCALED, EVEN_TEACHER, BLOCK_QUERIES, BLOCK_PASSAGES, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    t *= LOG2_E
    t = hide(
        t, mask_ptr, first_query, first_passage, target, queries, passages, mask_stride, HAS_MASK, EVEN_PASSAGES,
        BLOCK_QUERIES, BLOCK_PASSAGES,
    )  # fmt: skip
    s = score_tile(
        sq_ptr, sd_ptr, sq_inverse_ptr, sd_inverse_ptr, layer, first_query, first_passage, queries, passages,
        student_width, STUDENT_SCALED, EVEN_STUDENT, BLOCK_QUERIES, BLOCK_PASSAGES, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    t *= teacher_scale
    s = tl.where(t > HIDDEN_BELOW, s * LOG2_E * student_scale, HIDDEN)
    lse_t = tl.load(lse_ptr + layer * queries + row)[:, None]
    lse_s = tl.load(lse_ptr + (layers + layer) * queries + row)[:, None]
    residual = _residual(t, s, lse_t, lse_s, RANGE)
    if STUDENT_SCALED:
        passage = tl.minimum(first_passage + tl.arange(0, BLOCK_PASSAGES), passages - 1)
        residual *= tl.load(sq_weight_ptr + layer * queries + row)[:, None]
        residual *= tl.load(sd_weight_ptr + layer * passages + passage)[None, :]
    residual = residual.to(residual_ptr.dtype.element_ty)
    place = tl.program_id(1) * BLOCK_PASSAGES + tl.arange(0, BLOCK_PASSAGES)
    base = residual_ptr + (tl.program_id(2).to(tl.int64) * queries + first_query) * chunk_passages
    offset = tl.arange(0, BLOCK_QUERIES)[:, None] * chunk_passages + place[None, :]
    tl.store(base + offset, residual, mask=(query < queries)[:, None] & (place < chunk_passages)[None, :])
