# mypy: allow-untyped-defs, allow-incomplete-defs
"""The attention KL in Triton: one forward kernel, and a backward of two (dQ, dK) that add up in a fixed order.

The forward visits every pair of score tiles once. Let t and s be the logits in base 2, m their running maxima, l the
running sums of 2^(t - m), and delta = (t - m_t) - (s - m_s). It carries w = sum 2^(t - m_t) delta. To new maxima it
moves by w <- 2^(m_t - m_t') (w + l_t ((m_t - m_t') - (m_s - m_s'))). Then KL = ln 2 (w / l_t - log2 l_t + log2 l_s).
Because delta is centred, an offset of the logits costs no digits. Only the two log-sum-exps are kept (8 bytes a row);
the backward recomputes the probabilities from them, and forms student minus teacher in float32 before any rounding.

All layer pairs of equal shapes and strides share a launch; a kernel finds its pair's tensors among tuples of pointers.

Dimensions: K pairs, B texts, H heads, L tokens, d width of a head.
"""

import triton
import triton.language as tl

from lead_ds.kernels.attention_kl.visible import bounds_of, is_real, load_tokens, meeting, pick, sees

# Finite, so that a row of hidden keys stays free of NaN.
_HIDDEN = tl.constexpr(-1e30)
# The log-sum-exp of a row that does not count: every probability recomputed from it is exactly 0.
_NO_ROW = tl.constexpr(1e30)
# Arguments that are not specialised: each value that is 1 or a multiple of 16 would be a build of its own.
_COUNTS = ["texts", "length", "band", "tiles"]


@triton.jit(do_not_specialize=_COUNTS)
def bounds_kernel(mask_ptr, bounds_ptr, length, BLOCK: tl.constexpr):
    """Of every text: its first and one past its last real token, whether there is no gap between, and how many."""
    text = tl.program_id(0)
    low = tl.full([BLOCK], 2147483647, dtype=tl.int32)
    high = tl.zeros([BLOCK], dtype=tl.int32)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        real = tl.load(mask_ptr + text.to(tl.int64) * length + token, mask=token < length, other=0) != 0
        low = tl.minimum(low, tl.where(real, token, 2147483647))
        high = tl.maximum(high, tl.where(real, token + 1, 0))
        count += real.to(tl.int32)
    last = tl.max(high, axis=0)
    first = tl.minimum(tl.min(low, axis=0), last)
    total = tl.sum(count, axis=0)
    tl.store(bounds_ptr + text * 4, first)
    tl.store(bounds_ptr + text * 4 + 1, last)
    tl.store(bounds_ptr + text * 4 + 2, (last - first == total).to(tl.int32))
    tl.store(bounds_ptr + text * 4 + 3, total)


@triton.jit
def _advance(
    state, t_q, s_q, t_k_base, s_k_base, mask_ptr, text, row, start, t_stride, s_stride, t_width, s_width, t_scale,
    s_scale, length, band, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BANDED: tl.constexpr, EVEN_T: tl.constexpr, EVEN_S: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward's sums over one more tile of keys."""
    m_t, l_t, m_s, l_s, w = state
    key = start + tl.arange(0, KEYS)
    real = is_real(mask_ptr, text, key, length, HAS_MASK) if MASKED else key >= 0
    t_k = load_tokens(t_k_base, key, t_stride, t_width, real, MASKED, EVEN_T, T_BLOCK)
    s_k = load_tokens(s_k_base, key, s_stride, s_width, real, MASKED, EVEN_S, S_BLOCK)
    t = tl.dot(t_q, tl.trans(t_k), input_precision=PRECISION) * t_scale
    s = tl.dot(s_q, tl.trans(s_k), input_precision=PRECISION) * s_scale
    if MASKED:
        seen = real[None, :] & sees(row[:, None], key[None, :], band, CAUSAL, BANDED)
        t = tl.where(seen, t, _HIDDEN)
        s = tl.where(seen, s, _HIDDEN)
    new_t = tl.maximum(m_t, tl.max(t, axis=1))
    new_s = tl.maximum(m_s, tl.max(s, axis=1))
    t = t - new_t[:, None]
    s = s - new_s[:, None]
    p = tl.exp2(t)
    alpha_t = tl.exp2(m_t - new_t)
    alpha_s = tl.exp2(m_s - new_s)
    w = alpha_t * (w + l_t * ((m_t - new_t) - (m_s - new_s))) + tl.sum(p * (t - s), axis=1)
    l_t = l_t * alpha_t + tl.sum(p, axis=1)
    l_s = l_s * alpha_s + tl.sum(tl.exp2(s), axis=1)
    return new_t, l_t, new_s, l_s, w


@triton.jit(do_not_specialize=_COUNTS)
def forward_kernel(
    tq_ptr, tk_ptr, sq_ptr, sk_ptr, mask_ptr, bounds_ptr, partial_ptr, t_lse_ptr, s_lse_ptr,
    tq_b, tq_h, tq_l, tk_b, tk_h, tk_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_l,
    texts, heads, length, t_group, s_group, t_width, s_width, t_scale, s_scale, band, tiles,
    PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_S: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one head: its sum of KL [K, B * H * tiles] and log-sum-exps [K, B, H, L], both in base 2."""
    pair = tl.program_id(1)
    place = tl.program_id(0) // tiles
    text = place // heads
    head = place % heads
    start = (tl.program_id(0) % tiles) * ROWS
    row = start + tl.arange(0, ROWS)
    wide_text = text.to(tl.int64)
    tq = pick(tq_ptr, pair, PAIRS) + wide_text * tq_b + head * tq_h
    sq = pick(sq_ptr, pair, PAIRS) + wide_text * sq_b + head * sq_h
    tk = pick(tk_ptr, pair, PAIRS) + wide_text * tk_b + (head // t_group) * tk_h
    sk = pick(sk_ptr, pair, PAIRS) + wide_text * sk_b + (head // s_group) * sk_h

    row_real = is_real(mask_ptr, text, row, length, HAS_MASK)
    t_q = load_tokens(tq, row, tq_l, t_width, row_real, True, EVEN_T, T_BLOCK)
    s_q = load_tokens(sq, row, sq_l, s_width, row_real, True, EVEN_S, S_BLOCK)
    low, high, solid = bounds_of(bounds_ptr, text, length, HAS_MASK)
    first, inner_first, inner_last, last = meeting(start, low, high, solid, band, CAUSAL, BANDED, True, ROWS, KEYS)

    nothing = tl.full([ROWS], _HIDDEN, dtype=tl.float32)
    zero = tl.zeros([ROWS], dtype=tl.float32)
    m_t, l_t, m_s, l_s, w = nothing, zero, nothing, zero, zero
    for tile in range(inner_first, inner_last):
        m_t, l_t, m_s, l_s, w = _advance(
            (m_t, l_t, m_s, l_s, w), t_q, s_q, tk, sk, mask_ptr, text, row, tile * KEYS, tk_l, sk_l, t_width, s_width,
            t_scale, s_scale, length, band, False, HAS_MASK, CAUSAL, BANDED, EVEN_T, EVEN_S, KEYS, T_BLOCK,
            S_BLOCK, PRECISION,
        )  # fmt: skip
    # What needs masks lies on both sides of the tiles above; it is peeled off so that they do without.
    for peeled in range(first, last - (inner_last - inner_first)):
        tile = tl.where(peeled < inner_first, peeled, peeled + (inner_last - inner_first))
        m_t, l_t, m_s, l_s, w = _advance(
            (m_t, l_t, m_s, l_s, w), t_q, s_q, tk, sk, mask_ptr, text, row, tile * KEYS, tk_l, sk_l, t_width,
            s_width, t_scale, s_scale, length, band, True, HAS_MASK, CAUSAL, BANDED, EVEN_T, EVEN_S, KEYS,
            T_BLOCK, S_BLOCK, PRECISION,
        )  # fmt: skip

    # A row that does not count may have seen no tile at all.
    l_t = tl.where(row_real, l_t, 1.0)
    l_s = tl.where(row_real, l_s, 1.0)
    log_t = tl.log2(l_t)
    log_s = tl.log2(l_s)
    kl = tl.where(row_real, w / l_t - (log_t - log_s), 0.0)
    tl.store(partial_ptr + pair.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.sum(kl, axis=0))
    out = (pair.to(tl.int64) * texts * heads + place) * length + row
    inside = row < length
    tl.store(t_lse_ptr + out, tl.where(row_real, m_t + log_t, _NO_ROW), mask=inside)
    tl.store(s_lse_ptr + out, tl.where(row_real, m_s + log_s, _NO_ROW), mask=inside)


@triton.jit
def _query_gradient(
    total, t_q, s_q, t_lse, s_lse, t_k_base, s_k_base, mask_ptr, text, row, start, t_stride, s_stride, t_width, s_width,
    t_scale, s_scale, length, band, MASKED: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BANDED: tl.constexpr, EVEN_T: tl.constexpr, EVEN_S: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R - P) K over one more tile of keys."""
    key = start + tl.arange(0, KEYS)
    real = is_real(mask_ptr, text, key, length, HAS_MASK) if MASKED else key >= 0
    t_k = load_tokens(t_k_base, key, t_stride, t_width, real, MASKED, EVEN_T, T_BLOCK)
    s_k = load_tokens(s_k_base, key, s_stride, s_width, real, MASKED, EVEN_S, S_BLOCK)
    t = tl.dot(t_q, tl.trans(t_k), input_precision=PRECISION) * t_scale
    s = tl.dot(s_q, tl.trans(s_k), input_precision=PRECISION) * s_scale
    if MASKED:
        seen = real[None, :] & sees(row[:, None], key[None, :], band, CAUSAL, BANDED)
        t = tl.where(seen, t, _HIDDEN)
        s = tl.where(seen, s, _HIDDEN)
    difference = tl.exp2(s - s_lse[:, None]) - tl.exp2(t - t_lse[:, None])
    return tl.dot(difference.to(s_k.dtype), s_k, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=_COUNTS)
def query_gradient_kernel(
    tq_ptr, tk_ptr, sq_ptr, sk_ptr, dq_ptr, mask_ptr, bounds_ptr, grad_ptr, t_lse_ptr, s_lse_ptr,
    tq_b, tq_h, tq_l, tk_b, tk_h, tk_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_l, dq_b, dq_h, dq_l,
    texts, heads, length, t_group, s_group, t_width, s_width, t_scale, s_scale, grad_scale, band, tiles,
    PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_S: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of rows of one head."""
    pair = tl.program_id(1)
    place = tl.program_id(0) // tiles
    text = place // heads
    head = place % heads
    start = (tl.program_id(0) % tiles) * ROWS
    row = start + tl.arange(0, ROWS)
    wide_text = text.to(tl.int64)
    tq = pick(tq_ptr, pair, PAIRS) + wide_text * tq_b + head * tq_h
    sq = pick(sq_ptr, pair, PAIRS) + wide_text * sq_b + head * sq_h
    tk = pick(tk_ptr, pair, PAIRS) + wide_text * tk_b + (head // t_group) * tk_h
    sk = pick(sk_ptr, pair, PAIRS) + wide_text * sk_b + (head // s_group) * sk_h
    dq = pick(dq_ptr, pair, PAIRS) + wide_text * dq_b + head * dq_h

    row_real = is_real(mask_ptr, text, row, length, HAS_MASK)
    t_q = load_tokens(tq, row, tq_l, t_width, row_real, True, EVEN_T, T_BLOCK)
    s_q = load_tokens(sq, row, sq_l, s_width, row_real, True, EVEN_S, S_BLOCK)
    saved = (pair.to(tl.int64) * texts * heads + place) * length + row
    t_lse = tl.load(t_lse_ptr + saved, mask=row < length, other=_NO_ROW)
    s_lse = tl.load(s_lse_ptr + saved, mask=row < length, other=_NO_ROW)
    low, high, solid = bounds_of(bounds_ptr, text, length, HAS_MASK)
    first, inner_first, inner_last, last = meeting(start, low, high, solid, band, CAUSAL, BANDED, True, ROWS, KEYS)

    total = tl.zeros([ROWS, S_BLOCK], dtype=tl.float32)
    for tile in range(inner_first, inner_last):
        total = _query_gradient(
            total, t_q, s_q, t_lse, s_lse, tk, sk, mask_ptr, text, row, tile * KEYS, tk_l, sk_l, t_width, s_width,
            t_scale, s_scale, length, band, False, HAS_MASK, CAUSAL, BANDED, EVEN_T, EVEN_S, KEYS, T_BLOCK,
            S_BLOCK, PRECISION,
        )  # fmt: skip
    for peeled in range(first, last - (inner_last - inner_first)):
        tile = tl.where(peeled < inner_first, peeled, peeled + (inner_last - inner_first))
        total = _query_gradient(
            total, t_q, s_q, t_lse, s_lse, tk, sk, mask_ptr, text, row, tile * KEYS, tk_l, sk_l, t_width, s_width,
            t_scale, s_scale, length, band, True, HAS_MASK, CAUSAL, BANDED, EVEN_T, EVEN_S, KEYS, T_BLOCK,
            S_BLOCK, PRECISION,
        )  # fmt: skip
    total = total * (tl.load(grad_ptr + pair) * grad_scale)
    column = tl.arange(0, S_BLOCK)
    out = dq + row[:, None] * dq_l + column[None, :]
    tl.store(out, total.to(sq.dtype.element_ty), mask=(row < length)[:, None] & (column < s_width)[None, :])


@triton.jit
def _key_gradient(
    total, t_k, s_k, key, key_real, tq, sq, t_lse_ptr, s_lse_ptr, dq_ptr, mask_ptr, text, start, tq_l, sq_l, t_width,
    s_width, t_scale, s_scale, gradient, length, band, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr, BANDED: tl.constexpr, EVEN_T: tl.constexpr, EVEN_S: tl.constexpr, ATOMIC: tl.constexpr,
    ROWS: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(R - P)^T Q over one more tile of rows; rows that do not count have probabilities of exactly 0."""
    row = start + tl.arange(0, ROWS)
    real = is_real(mask_ptr, text, row, length, HAS_MASK) if MASKED else row >= 0
    t_q = load_tokens(tq, row, tq_l, t_width, real, MASKED, EVEN_T, T_BLOCK)
    s_q = load_tokens(sq, row, sq_l, s_width, real, MASKED, EVEN_S, S_BLOCK)
    if MASKED:
        t_lse = tl.load(t_lse_ptr + row, mask=row < length, other=_NO_ROW)
        s_lse = tl.load(s_lse_ptr + row, mask=row < length, other=_NO_ROW)
    else:
        t_lse = tl.load(t_lse_ptr + row)
        s_lse = tl.load(s_lse_ptr + row)
    t = tl.dot(t_k, tl.trans(t_q), input_precision=PRECISION) * t_scale
    s = tl.dot(s_k, tl.trans(s_q), input_precision=PRECISION) * s_scale
    if MASKED and (CAUSAL or BANDED):
        seen = sees(row[None, :], key[:, None], band, CAUSAL, BANDED)
        t = tl.where(seen, t, _HIDDEN)
        s = tl.where(seen, s, _HIDDEN)
    difference = tl.exp2(s - s_lse[None, :]) - tl.exp2(t - t_lse[None, :])
    if ATOMIC:
        # A hidden key's row is never stored as dK, but here it would reach dQ.
        difference = tl.where(key_real[:, None], difference, 0.0)
        part = tl.dot(tl.trans(difference.to(s_k.dtype)), s_k, input_precision=PRECISION) * gradient
        column = tl.arange(0, S_BLOCK)
        inside = real[:, None] & (column < s_width)[None, :]
        tl.atomic_add(dq_ptr + row[:, None] * s_width + column[None, :], part, mask=inside, sem="relaxed")
    return tl.dot(difference.to(s_q.dtype), s_q, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=_COUNTS)
def key_gradient_kernel(
    tq_ptr, tk_ptr, sq_ptr, sk_ptr, dk_ptr, dq_ptr, mask_ptr, bounds_ptr, grad_ptr, t_lse_ptr, s_lse_ptr,
    tq_b, tq_h, tq_l, tk_b, tk_h, tk_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_l, dk_b, dk_h, dk_l,
    texts, heads, length, t_group, s_group, t_width, s_width, t_scale, s_scale, grad_scale, band, tiles,
    PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_S: tl.constexpr, ATOMIC: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK of a tile of keys of one student key head, over all its query heads; with ATOMIC also dQ [K, B, H, L, d]."""
    pair = tl.program_id(1)
    place = tl.program_id(0) // tiles
    key_heads = heads // s_group
    text = place // key_heads
    key_head = place % key_heads
    start = (tl.program_id(0) % tiles) * KEYS
    key = start + tl.arange(0, KEYS)
    wide_text = text.to(tl.int64)
    tq_text = pick(tq_ptr, pair, PAIRS) + wide_text * tq_b
    sq_text = pick(sq_ptr, pair, PAIRS) + wide_text * sq_b
    tk_text = pick(tk_ptr, pair, PAIRS) + wide_text * tk_b
    sk = pick(sk_ptr, pair, PAIRS) + wide_text * sk_b + key_head * sk_h
    dk = pick(dk_ptr, pair, PAIRS) + wide_text * dk_b + key_head * dk_h
    gradient = tl.load(grad_ptr + pair) * grad_scale

    key_real = is_real(mask_ptr, text, key, length, HAS_MASK)
    s_k = load_tokens(sk, key, sk_l, s_width, key_real, True, EVEN_S, S_BLOCK)
    low, high, solid = bounds_of(bounds_ptr, text, length, HAS_MASK)
    first, inner_first, inner_last, last = meeting(start, low, high, solid, band, CAUSAL, BANDED, False, KEYS, ROWS)

    total = tl.zeros([KEYS, S_BLOCK], dtype=tl.float32)
    for member in range(s_group):
        head = key_head * s_group + member
        t_k = load_tokens(tk_text + (head // t_group) * tk_h, key, tk_l, t_width, key_real, True, EVEN_T, T_BLOCK)
        tq = tq_text + head * tq_h
        sq = sq_text + head * sq_h
        saved = (pair.to(tl.int64) * texts * heads + text * heads + head) * length
        for tile in range(inner_first, inner_last):
            total = _key_gradient(
                total, t_k, s_k, key, key_real, tq, sq, t_lse_ptr + saved, s_lse_ptr + saved, dq_ptr + saved * s_width,
                mask_ptr, text, tile * ROWS, tq_l, sq_l, t_width, s_width, t_scale, s_scale, gradient, length, band,
                False, HAS_MASK, CAUSAL, BANDED, EVEN_T, EVEN_S, ATOMIC, ROWS, T_BLOCK, S_BLOCK, PRECISION,
            )  # fmt: skip
        for peeled in range(first, last - (inner_last - inner_first)):
            tile = tl.where(peeled < inner_first, peeled, peeled + (inner_last - inner_first))
            total = _key_gradient(
                total, t_k, s_k, key, key_real, tq, sq, t_lse_ptr + saved, s_lse_ptr + saved,
                dq_ptr + saved * s_width, mask_ptr, text, tile * ROWS, tq_l, sq_l, t_width, s_width, t_scale,
                s_scale, gradient, length, band, True, HAS_MASK, CAUSAL, BANDED, EVEN_T, EVEN_S, ATOMIC, ROWS,
                T_BLOCK, S_BLOCK, PRECISION,
            )  # fmt: skip
    total = tl.where(key_real[:, None], total * gradient, 0.0)
    column = tl.arange(0, S_BLOCK)
    out = dk + key[:, None] * dk_l + column[None, :]
    tl.store(out, total.to(sk.dtype.element_ty), mask=(key < length)[:, None] & (column < s_width)[None, :])
