# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the programs of the layer-relevance KL share: the scores of a tile, with what is left out hidden.

Everything is in base 2 (scores times log2 e), and KL sums are centred on the running maxima. With t and s the two
models' scores, delta = (t - m_t) - (s - m_s), which keeps full precision at any common offset.

Dimensions: K layer pairs, Q queries, P passages, D width.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Scores of passages left out, and where running maxima start: finite, and far enough apart that 2^(hidden - start) is 0.
HIDDEN = tl.constexpr(-1e30)
START = tl.constexpr(-1e20)
# Between any real score and a hidden one, at any temperature that leaves the hidden value finite.
HIDDEN_BELOW = tl.constexpr(-1e19)
# What a share of the passages leaves behind per row: maximum and sum of each side, KL sum, sum at temperature 1, target.
STATISTICS = tl.constexpr(7)
# Arguments that are not specialised: each value that is 1 or a multiple of 16 would be a build of its own.
COUNTS = ["layers", "queries", "passages", "shares", "tiles_per_share", "first_layer", "chunk_start"]


@triton.jit
def score_tile(
    q_ptr, d_ptr, q_inverse_ptr, d_inverse_ptr, layer, first_query, first_passage, queries, passages, width,
    SCALED: tl.constexpr, EVEN_WIDTH: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_PASSAGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of one layer, in float32; rows past the end repeat the last and are hidden afterwards.

    SCALED: products are multiplied by a number of each query and of each passage: their lengths' inverses, say.
    """
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
    if SCALED:
        q_inverse = tl.load(q_inverse_ptr + layer * queries + first_query + query)
        d_inverse = tl.load(d_inverse_ptr + layer * passages + first_passage + passage)
        product = product * q_inverse[:, None] * d_inverse[None, :]
    return product


@triton.jit
def hide(
    scores, mask_ptr, first_query, first_passage, target, queries, passages, mask_stride, HAS_MASK: tl.constexpr,
    EVEN_PASSAGES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_PASSAGES: tl.constexpr,
):  # fmt: skip
    """The scores with those of passages past the end, or masked and not the row's target, at the hidden value."""
    place = tl.arange(0, BLOCK_PASSAGES)
    if HAS_MASK:
        # Rows past the end repeat the last one. The mask's rows are padded, with zeros, to a multiple of the tile.
        query = tl.minimum(tl.arange(0, BLOCK_QUERIES), queries - 1 - first_query)
        base = mask_ptr + first_query.to(tl.int64) * mask_stride + first_passage
        kept = tl.load(base + (query[:, None] * mask_stride + place[None, :])) != 0
        kept = kept | (place[None, :] == (target - first_passage)[:, None])
        scores = tl.where(kept, scores, HIDDEN)
    elif not EVEN_PASSAGES:
        scores = tl.where((place < passages - first_passage)[None, :], scores, HIDDEN)
    return scores
