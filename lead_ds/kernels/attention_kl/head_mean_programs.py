# mypy: allow-untyped-defs, allow-incomplete-defs
"""The attention KL of head-averaged maps in Triton: log-sum-exps, a forward, and a gradient kernel that runs twice.

Of logits x_h in base 2, centred by their row's log-sum-exp, the mean over H heads is log m = log2(sum_h 2^x_h / H). It is
held as a logarithm, for a mean may be smaller than any float32. With means t and s, KL = sum_j t ln (t / s) - t + s. The
last two sum to 0; with them a log-sum-exp's rounding counts only where t and s differ.
Let p_h be a student's probabilities and u = 1 - t / s. Then the gradient to a head's logits is p_h (u - E_h) / H, with
E_h = sum_j p_h u. The 1 in u changes nothing, for p_h sums to 1, and makes equal models' gradient exactly 0. The product
p_h u is formed as 2^x_h - 2^(x_h - log s + log t): both terms are bounded, where u alone is not.

A program owns a tile of rows (or of keys, for dK), visits the tiles that meet it, and in each runs over all heads twice.
It alone adds to its part of a result, tile after tile: float32 additions in memory, in a fixed order.

Dimensions: K pairs, B texts, H heads, L tokens, d width of a head.
"""

import triton
import triton.language as tl

from lead_ds.kernels.attention_kl.visible import bounds_of, is_real, load_tokens, meeting, pick, sees

# Finite, so that a row of hidden keys stays free of NaN.
_HIDDEN = tl.constexpr(-1e30)
# The maximum of a row that does not count: every probability recomputed from it is exactly 0.
_NO_ROW = tl.constexpr(1e30)
# Below every logit, hidden ones and those of rows that do not count included.
_LOWEST = tl.constexpr(-1e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments that are not specialised: each value that is 1 or a multiple of 16 would be a build of its own.
_COUNTS = ["texts", "heads", "t_heads", "s_heads", "length", "band", "tiles"]


@triton.jit(do_not_specialize=_COUNTS)
def lse_kernel(
    q_ptr, k_ptr, mask_ptr, bounds_ptr, lse_ptr, q_b, q_h, q_l, k_b, k_h, k_l, texts, heads, length, group, width, scale,
    band, tiles, PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One model's maxima and logarithms of sums over them [K, B, H, 2, L], in base 2, of a tile of rows of one head.

    Apart, for their sum would round a large offset's last digits away.
    """
    pair = tl.program_id(1)
    place = tl.program_id(0) // tiles
    text = place // heads
    head = place % heads
    start = (tl.program_id(0) % tiles) * ROWS
    row = start + tl.arange(0, ROWS)
    wide_text = text.to(tl.int64)
    q_base = pick(q_ptr, pair, PAIRS) + wide_text * q_b + head * q_h
    k_base = pick(k_ptr, pair, PAIRS) + wide_text * k_b + (head // group) * k_h
    row_real = is_real(mask_ptr, text, row, length, HAS_MASK)
    q = load_tokens(q_base, row, q_l, width, row_real, True, EVEN, BLOCK)
    low, high, solid = bounds_of(bounds_ptr, text, length, HAS_MASK)
    first, _low, _high, last = meeting(start, low, high, solid, band, CAUSAL, BANDED, True, ROWS, KEYS)

    peak = tl.full([ROWS], _HIDDEN, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for tile in range(first, last):
        key = tile * KEYS + tl.arange(0, KEYS)
        real = is_real(mask_ptr, text, key, length, HAS_MASK)
        k = load_tokens(k_base, key, k_l, width, real, True, EVEN, BLOCK)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        x = tl.where(real[None, :] & sees(row[:, None], key[None, :], band, CAUSAL, BANDED), x, _HIDDEN)
        higher = tl.maximum(peak, tl.max(x, axis=1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(x - higher[:, None]), axis=1)
        peak = higher
    # A row that does not count may have seen no tile at all.
    log = tl.log2(tl.where(row_real, total, 1.0))
    out = lse_ptr + (pair.to(tl.int64) * texts * heads + place) * 2 * length + row
    inside = row < length
    tl.store(out, tl.where(row_real, peak, _NO_ROW), mask=inside)
    tl.store(out + length, log, mask=inside)


@triton.jit
def _log_probabilities(
    q_base, k_base, lse_base, head, row, key, row_real, key_real, q_h, q_l, k_h, k_l, group, width, scale, length,
    OF_ROWS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's, in base 2, [rows, keys] and the keys' vectors; or [keys, rows] and the rows', where keys are owned."""
    q = load_tokens(q_base + head * q_h, row, q_l, width, row_real, True, EVEN, BLOCK)
    k = load_tokens(k_base + (head // group) * k_h, key, k_l, width, key_real, True, EVEN, BLOCK)
    at = lse_base + head * 2 * length + row
    peak = tl.load(at, mask=row < length, other=_NO_ROW)
    log = tl.load(at + length, mask=row < length, other=0.0)
    if OF_ROWS:
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - peak[:, None] - log[:, None]
        return x, k
    else:
        x = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - peak[None, :] - log[None, :]
        return x, q


@triton.jit
def _log_mean(
    q_base, k_base, lse_base, row, key, row_real, key_real, q_h, q_l, k_h, k_l, heads, group, width, scale, log_heads,
    length, OF_ROWS: tl.constexpr, EVEN: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of one model's map averaged over its heads, [OWN, OTHER]; of hidden keys it is any number."""
    peak = tl.full([OWN, OTHER], _LOWEST, dtype=tl.float32)
    total = tl.zeros([OWN, OTHER], dtype=tl.float32)
    for head in range(heads):
        x, _vectors = _log_probabilities(
            q_base, k_base, lse_base, head, row, key, row_real, key_real, q_h, q_l, k_h, k_l, group, width, scale,
            length, OF_ROWS, EVEN, BLOCK, PRECISION,
        )  # fmt: skip
        # One power a head, whichever of the two is the larger; NaN is never higher, and stays in the total.
        less = tl.exp2(-tl.abs(x - peak))
        higher = x > peak
        total = tl.where(higher, total * less + 1.0, total + less)
        peak = tl.where(higher, x, peak)
    return peak + tl.log2(total) - log_heads


@triton.jit(do_not_specialize=_COUNTS)
def head_mean_kernel(
    tq_ptr, tk_ptr, sq_ptr, sk_ptr, mask_ptr, bounds_ptr, partial_ptr, change_ptr, t_lse_ptr, s_lse_ptr,
    tq_b, tq_h, tq_l, tk_b, tk_h, tk_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_l,
    texts, t_heads, s_heads, length, t_group, s_group, t_width, s_width, t_scale, s_scale, t_log, s_log, band, tiles,
    PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_S: tl.constexpr, WITH_GRAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows: its sum of KL [K, B * tiles] in base 2; WITH_GRAD also E, added to `change` [K, B, Hs, L]."""
    pair = tl.program_id(1)
    text = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * ROWS
    row = start + tl.arange(0, ROWS)
    wide_text = text.to(tl.int64)
    tq = pick(tq_ptr, pair, PAIRS) + wide_text * tq_b
    sq = pick(sq_ptr, pair, PAIRS) + wide_text * sq_b
    tk = pick(tk_ptr, pair, PAIRS) + wide_text * tk_b
    sk = pick(sk_ptr, pair, PAIRS) + wide_text * sk_b
    place = pair.to(tl.int64) * texts + text
    t_lse = t_lse_ptr + place * t_heads * 2 * length
    s_lse = s_lse_ptr + place * s_heads * 2 * length
    row_real = is_real(mask_ptr, text, row, length, HAS_MASK)
    low, high, solid = bounds_of(bounds_ptr, text, length, HAS_MASK)
    first, _low, _high, last = meeting(start, low, high, solid, band, CAUSAL, BANDED, True, ROWS, KEYS)

    kl = tl.zeros([ROWS], dtype=tl.float32)
    for tile in range(first, last):
        key = tile * KEYS + tl.arange(0, KEYS)
        key_real = is_real(mask_ptr, text, key, length, HAS_MASK)
        seen = key_real[None, :] & sees(row[:, None], key[None, :], band, CAUSAL, BANDED)
        log_t = _log_mean(
            tq, tk, t_lse, row, key, row_real, key_real, tq_h, tq_l, tk_h, tk_l, t_heads, t_group, t_width, t_scale,
            t_log, length, True, EVEN_T, ROWS, KEYS, T_BLOCK, PRECISION,
        )  # fmt: skip
        log_s = _log_mean(
            sq, sk, s_lse, row, key, row_real, key_real, sq_h, sq_l, sk_h, sk_l, s_heads, s_group, s_width, s_scale,
            s_log, length, True, EVEN_S, ROWS, KEYS, S_BLOCK, PRECISION,
        )  # fmt: skip
        lead = log_s - log_t
        t = tl.exp2(log_t)
        kl += tl.sum(tl.where(seen, (tl.exp2(log_s) - t) * _LOG2_E - t * lead, 0.0), axis=1)
        if WITH_GRAD:
            for head in range(s_heads):
                x, _vectors = _log_probabilities(
                    sq, sk, s_lse, head, row, key, row_real, key_real, sq_h, sq_l, sk_h, sk_l, s_group, s_width, s_scale,
                    length, True, EVEN_S, S_BLOCK, PRECISION,
                )  # fmt: skip
                part = tl.sum(tl.where(seen, tl.exp2(x) - tl.exp2(x - lead), 0.0), axis=1)
                at = change_ptr + (place * s_heads + head) * length + row
                tl.atomic_add(at, part, mask=row < length, sem="relaxed")
    kl = tl.where(row_real, kl, 0.0)
    tl.store(partial_ptr + pair.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.sum(kl, axis=0))


@triton.jit(do_not_specialize=_COUNTS)
def head_mean_gradient_kernel(
    tq_ptr, tk_ptr, sq_ptr, sk_ptr, sum_ptr, mask_ptr, bounds_ptr, grad_ptr, change_ptr, t_lse_ptr, s_lse_ptr,
    tq_b, tq_h, tq_l, tk_b, tk_h, tk_l, sq_b, sq_h, sq_l, sk_b, sk_h, sk_l,
    texts, t_heads, s_heads, length, t_group, s_group, t_width, s_width, t_scale, s_scale, t_log, s_log, grad_scale,
    band, tiles, PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr,
    EVEN_T: tl.constexpr, EVEN_S: tl.constexpr, OF_ROWS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, T_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OF_ROWS: dQ of a tile of rows, added to `sum` [K, B, Hs, L, d]; else dK of a tile of keys, to [K, B, Hs / Gs, L, d]."""
    OWN: tl.constexpr = ROWS if OF_ROWS else KEYS
    OTHER: tl.constexpr = KEYS if OF_ROWS else ROWS
    pair = tl.program_id(1)
    text = tl.program_id(0) // tiles
    start = (tl.program_id(0) % tiles) * OWN
    own = start + tl.arange(0, OWN)
    wide_text = text.to(tl.int64)
    tq = pick(tq_ptr, pair, PAIRS) + wide_text * tq_b
    sq = pick(sq_ptr, pair, PAIRS) + wide_text * sq_b
    tk = pick(tk_ptr, pair, PAIRS) + wide_text * tk_b
    sk = pick(sk_ptr, pair, PAIRS) + wide_text * sk_b
    place = pair.to(tl.int64) * texts + text
    t_lse = t_lse_ptr + place * t_heads * 2 * length
    s_lse = s_lse_ptr + place * s_heads * 2 * length
    change = change_ptr + place * s_heads * length
    gradient = tl.load(grad_ptr + pair) * grad_scale
    own_real = is_real(mask_ptr, text, own, length, HAS_MASK)
    low, high, solid = bounds_of(bounds_ptr, text, length, HAS_MASK)
    first, _low, _high, last = meeting(start, low, high, solid, band, CAUSAL, BANDED, OF_ROWS, OWN, OTHER)
    column = tl.arange(0, S_BLOCK)
    out = own[:, None] * s_width + column[None, :]
    inside = own_real[:, None] & (column < s_width)[None, :]

    for tile in range(first, last):
        other = tile * OTHER + tl.arange(0, OTHER)
        other_real = is_real(mask_ptr, text, other, length, HAS_MASK)
        both_real = own_real[:, None] & other_real[None, :]
        if OF_ROWS:
            row, row_real, key, key_real = own, own_real, other, other_real
            seen = both_real & sees(own[:, None], other[None, :], band, CAUSAL, BANDED)
        else:
            row, row_real, key, key_real = other, other_real, own, own_real
            seen = both_real & sees(other[None, :], own[:, None], band, CAUSAL, BANDED)
        log_t = _log_mean(
            tq, tk, t_lse, row, key, row_real, key_real, tq_h, tq_l, tk_h, tk_l, t_heads, t_group, t_width, t_scale,
            t_log, length, OF_ROWS, EVEN_T, OWN, OTHER, T_BLOCK, PRECISION,
        )  # fmt: skip
        log_s = _log_mean(
            sq, sk, s_lse, row, key, row_real, key_real, sq_h, sq_l, sk_h, sk_l, s_heads, s_group, s_width, s_scale,
            s_log, length, OF_ROWS, EVEN_S, OWN, OTHER, S_BLOCK, PRECISION,
        )  # fmt: skip
        lead = log_s - log_t
        for head in range(s_heads):
            x, vectors = _log_probabilities(
                sq, sk, s_lse, head, row, key, row_real, key_real, sq_h, sq_l, sk_h, sk_l, s_group, s_width, s_scale,
                length, OF_ROWS, EVEN_S, S_BLOCK, PRECISION,
            )  # fmt: skip
            expected = tl.load(change + head * length + row, mask=row < length, other=0.0)
            p = tl.exp2(x)
            if OF_ROWS:
                logits = p - tl.exp2(x - lead) - p * expected[:, None]
                owner = place * s_heads + head
            else:
                logits = p - tl.exp2(x - lead) - p * expected[None, :]
                owner = place * (s_heads // s_group) + head // s_group
            logits = tl.where(seen, logits, 0.0).to(vectors.dtype)
            part = tl.dot(logits, vectors, input_precision=PRECISION) * gradient
            tl.atomic_add(sum_ptr + owner * length * s_width + out, part, mask=inside, sem="relaxed")
