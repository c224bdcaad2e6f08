# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which query rows and keys of a text see each other, tile by tile, and how their tokens are loaded."""

import triton
import triton.language as tl


@triton.jit
def pick(pointers, pair, PAIRS: tl.constexpr):
    """The tensor of a layer pair, out of a tuple (or the only one)."""
    if PAIRS == 1:
        return pointers
    else:
        chosen = pointers[0]
        for i in tl.static_range(1, PAIRS):
            chosen = tl.where(pair == i, pointers[i], chosen)
        return chosen


@triton.jit
def bounds_of(bounds_ptr, text, length, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        low = tl.load(bounds_ptr + text * 4)
        high = tl.load(bounds_ptr + text * 4 + 1)
        solid = tl.load(bounds_ptr + text * 4 + 2)
    else:
        low = 0
        high = length
        solid = 1
    return low, high, solid


@triton.jit
def span(low, high, inner_low, inner_high, BLOCK: tl.constexpr):
    """Tiles that cover [low, high), and among them those that lie in [inner_low, inner_high) and need no masks."""
    first = low // BLOCK
    last = tl.maximum(first, (high + BLOCK - 1) // BLOCK)
    inner_first = tl.minimum(tl.maximum((inner_low + BLOCK - 1) // BLOCK, first), last)
    inner_last = tl.maximum(inner_first, tl.minimum(inner_high // BLOCK, last))
    return first, inner_first, inner_last, last


@triton.jit
def meeting(
    start, low, high, solid, band, CAUSAL: tl.constexpr, BANDED: tl.constexpr, OF_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles of keys that rows start .. start + BLOCK - 1 see (OF_ROWS), or of rows that see such keys; none if none is real."""
    high = tl.where((start >= high) | (start + BLOCK <= low), low, high)
    inner_low = low
    inner_high = high
    if CAUSAL and OF_ROWS:
        high = tl.minimum(high, start + BLOCK)
        inner_high = tl.minimum(inner_high, start + 1)
    elif CAUSAL:
        low = tl.maximum(low, start)
        inner_low = tl.maximum(inner_low, start + BLOCK - 1)
    if BANDED:
        low = tl.maximum(low, start - band)
        high = tl.minimum(high, start + BLOCK + band)
        inner_low = tl.maximum(inner_low, start + BLOCK - 1 - band)
        inner_high = tl.minimum(inner_high, start + band + 1)
    inner_high = tl.where(solid != 0, inner_high, inner_low)
    return span(low, high, inner_low, inner_high, TILE)


@triton.jit
def is_real(mask_ptr, text, token, length, HAS_MASK: tl.constexpr):
    real = token < length
    if HAS_MASK:
        real = tl.load(mask_ptr + text.to(tl.int64) * length + token, mask=real, other=0) != 0
    return real


@triton.jit
def load_tokens(base, token, stride, width, real, MASKED: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens' vectors [tokens, BLOCK]; where masked, tokens that are not real are 0, for they may hold NaN."""
    column = tl.arange(0, BLOCK)
    place = base + token[:, None] * stride + column[None, :]
    if MASKED and EVEN:
        return tl.load(place, mask=real[:, None], other=0.0)
    elif MASKED:
        return tl.load(place, mask=real[:, None] & (column < width)[None, :], other=0.0)
    elif EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=(column < width)[None, :], other=0.0)


@triton.jit
def sees(row, key, band, CAUSAL: tl.constexpr, BANDED: tl.constexpr):
    """Whether a row sees a key by position, for shapes that broadcast."""
    seen = key <= row if CAUSAL else key == key
    if BANDED:
        seen = seen & (tl.abs(row - key) <= band)
    return seen
