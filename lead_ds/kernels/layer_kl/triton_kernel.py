# mypy: allow-untyped-defs, allow-incomplete-defs
"""Layer-relevance KL in Triton, all layer pairs in one launch.

Forward: every program walks a share of the passages for one tile of queries and keeps, per row and side, a running maximum,
sum and centred KL sum; a second kernel merges the shares. Backward: for small batches both gradients come from one launch
that reads the stored scores; otherwise the residual R - P is recomputed into a bounded workspace, half precision, and
multiplied by the vendor's matrix product.

Dimensions: K layer pairs, Q queries, P passages, D width.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.dispatch import architecture, float32_dot_precision, processor_count, tiles_for
from lead_ds.kernels.layer_kl import chunked
from lead_ds.kernels.layer_kl.programs import (
    _STATISTICS,
    combine_kernel,
    gradient_kernel,
    residual_kernel,
    scores_kernel,
)
from lead_ds.kernels.layer_kl.regime import saved_shapes, stores_maps
from lead_ds.kernels.layout import aligned

# float16 holds probabilities below 6e-5 badly: residuals are stored this much larger, and divided by it in float32.
_FLOAT16_RANGE = 2.0**15

_MAX_SHARES = 64
_COMBINE_ROWS = 32
# Bytes of residuals that the backward pass holds at once.
_WORKSPACE = 64 << 20


class ScoreTiles(NamedTuple):
    """Queries, passages and width of a tile of scores, warps and stages."""

    queries: int
    passages: int
    width: int
    warps: int
    stages: int


# By element size and amount of work: small batches want many short programs; large ones hold both models' score tiles in
# registers, beside which a tile of the mask, or the addresses at which scores are stored, does not fit ("crowded").
_SCORES: dict[int, dict[tuple[int, str], ScoreTiles]] = {
    80: {
        (2, "small"): ScoreTiles(64, 32, 64, 4, 3),
        (2, "large"): ScoreTiles(128, 64, 32, 8, 3),
        (2, "large, crowded"): ScoreTiles(128, 64, 32, 8, 3),
        (4, "small"): ScoreTiles(32, 32, 32, 4, 2),
        (4, "large"): ScoreTiles(64, 64, 32, 8, 2),
        (4, "large, crowded"): ScoreTiles(32, 32, 32, 4, 2),
    },
    90: {
        (2, "small"): ScoreTiles(64, 32, 128, 4, 4),
        (2, "large"): ScoreTiles(128, 128, 64, 8, 4),
        (2, "large, crowded"): ScoreTiles(128, 64, 64, 8, 4),
        (4, "small"): ScoreTiles(32, 32, 32, 4, 2),
        (4, "large"): ScoreTiles(64, 64, 32, 8, 2),
        (4, "large, crowded"): ScoreTiles(32, 32, 32, 4, 2),
    },
}
# Tiles of the one-launch backward pass, by element size.
_GRADIENT: dict[int, dict[int, ScoreTiles]] = {
    80: {2: ScoreTiles(64, 64, 64, 4, 2), 4: ScoreTiles(32, 32, 64, 4, 2)},
    90: {2: ScoreTiles(64, 64, 128, 4, 2), 4: ScoreTiles(32, 32, 64, 4, 2)},
}


def forward(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kl [K], teacher_nll [K], saved maps, saved log-sum-exps); what is saved is described in `regime.saved_shapes`."""
    layers, queries, passages = *tq.shape[:2], td.shape[1]
    maps_shape, lse_shape = saved_shapes("triton", layers, queries, passages, differentiable)
    new: dict[str, Any] = {"dtype": torch.float32, "device": tq.device}
    maps = torch.empty(maps_shape, **new)
    if layers * queries * passages == 0:
        kl, nll, _, _ = chunked.forward(tq, td, sq, sd, target, mask, teacher_temperature, student_temperature, False)
        return kl, nll, maps, torch.empty(lse_shape, **new)
    tq, td, sq, sd = aligned(tq), aligned(td), aligned(sq), aligned(sd)
    lse = torch.empty((2, layers, queries), **new)
    store, tempered = len(maps_shape) == 4, teacher_temperature != 1.0
    tiles = _score_tiles(tq, sq, queries, passages, store or mask is not None)
    query_tiles, passage_tiles = triton.cdiv(queries, tiles.queries), triton.cdiv(passages, tiles.passages)
    # About eight programs a multiprocessor, or one tile each where there are fewer tiles than that.
    wanted = min(_MAX_SHARES, max(1, 8 * processor_count(tq) // (layers * query_tiles)))
    tiles_per_share = triton.cdiv(passage_tiles, wanted)
    shares = triton.cdiv(passage_tiles, tiles_per_share)
    statistics = torch.empty((layers, shares, _STATISTICS.value, queries), **new)
    mask_bytes = _bytes(mask, tiles.passages, target)
    scores_kernel[(query_tiles, shares, layers)](
        tq,
        td,
        sq,
        sd,
        target,
        mask_bytes,
        maps if store else statistics,
        statistics,
        queries,
        passages,
        tq.shape[2],
        sq.shape[2],
        maps.shape[-1],
        maps.numel() // 2,
        mask_bytes.stride(0),
        tiles_per_share,
        1.0 / teacher_temperature,
        1.0 / student_temperature,
        **_score_constants(tiles, tq.shape[2], sq.shape[2], passages, mask is not None),
        STORE=store,
        TEMPERED=tempered,
        PRECISION=float32_dot_precision(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    blocks = triton.cdiv(queries, _COMBINE_ROWS)
    kl, nll = torch.empty((layers, blocks), **new), torch.empty((layers, blocks), **new)
    combine_kernel[(layers, blocks)](
        statistics,
        lse,
        kl,
        nll,
        layers,
        queries,
        shares,
        TEMPERED=tempered,
        BLOCK_SHARES=triton.next_power_of_2(shares),
        BLOCK_QUERIES=_COMBINE_ROWS,
        num_warps=4,
    )
    if blocks == 1:
        kl, nll = kl.view(layers), nll.view(layers)
    else:
        kl, nll = kl.sum(dim=1), nll.sum(dim=1)
    return kl, nll, maps, lse if lse_shape == lse.shape else lse.new_empty(lse_shape)


def backward(
    grad: Tensor,
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    teacher_temperature: float,
    student_temperature: float,
    maps: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of sq and sd: dS = g_k / (Q T_s) (R - P), dq = dS d, dd = dS^T q."""
    layers, queries, passages = *tq.shape[:2], td.shape[1]
    if layers * queries * passages == 0:
        return torch.zeros_like(sq), torch.zeros_like(sd)
    width = sq.shape[2]
    tq, td, sq, sd, grad = aligned(tq), aligned(td), aligned(sq), aligned(sd), grad.contiguous()
    scale = 1.0 / (queries * student_temperature)
    if stores_maps(layers, queries, passages):
        dq, dd = _from_maps(grad, sq, sd, maps, lse, scale)
    else:
        scales = 1.0 / teacher_temperature, 1.0 / student_temperature
        dq, dd = _recomputed(grad * scale, tq, td, sq, sd, target, mask, scales, lse)
    return dq[..., :width].contiguous(), dd[..., :width].contiguous()


def _from_maps(grad: Tensor, sq: Tensor, sd: Tensor, maps: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    layers, queries, width = sq.shape
    passages = sd.shape[1]
    dq, dd = torch.empty_like(sq), torch.empty_like(sd)
    tiles = _gradient_tiles(architecture(sq), sq.element_size(), width)
    row_tiles = triton.cdiv(queries, tiles.queries) + triton.cdiv(passages, tiles.passages)
    gradient_kernel[(row_tiles, triton.cdiv(width, tiles.width), layers)](
        maps,
        lse,
        grad,
        sq,
        sd,
        dq,
        dd,
        layers,
        queries,
        passages,
        width,
        maps.shape[-1],
        maps.numel() // 2,
        scale,
        **_gradient_constants(tiles, sq.dtype),
        PRECISION=float32_dot_precision(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dq, dd


def _recomputed(
    scale_K: Tensor,
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    mask: Tensor | None,
    scales: tuple[float, float],
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Residuals of as many layers, or as much of one layer, as the workspace holds; then two matrix products of each."""
    layers, queries, passages = *tq.shape[:2], td.shape[1]
    tiles = _score_tiles(tq, sq, queries, passages, mask is not None)
    chunk_k, chunk_p = _chunks(layers, queries, passages, sq.element_size(), tiles.passages)
    residual_range = _range(sq.dtype)
    workspace = torch.empty(chunk_k * queries * chunk_p, dtype=sq.dtype, device=sq.device)
    dq, dd = torch.empty_like(sq), torch.empty_like(sd)
    constants = _score_constants(tiles, tq.shape[2], sq.shape[2], passages, mask is not None)
    mask_bytes = _bytes(mask, tiles.passages, target)
    for k in range(0, layers, chunk_k):
        here = slice(k, min(k + chunk_k, layers))
        count = here.stop - k
        scale_K11 = (scale_K[here] / residual_range)[:, None, None]
        dq_KQD = torch.zeros((count, queries, sq.shape[2]), dtype=torch.float32, device=sq.device)
        for p in range(0, passages, chunk_p):
            width_p = min(chunk_p, passages - p)
            residual_KQP = workspace[: count * queries * width_p].view(count, queries, width_p)
            grid = (triton.cdiv(queries, tiles.queries), triton.cdiv(width_p, tiles.passages), count)
            residual_kernel[grid](
                tq,
                td,
                sq,
                sd,
                target,
                mask_bytes,
                lse,
                residual_KQP,
                layers,
                queries,
                passages,
                tq.shape[2],
                sq.shape[2],
                mask_bytes.stride(0),
                k,
                p,
                width_p,
                *scales,
                **constants,
                RANGE=residual_range,
                PRECISION=float32_dot_precision(),
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
            part_p = slice(p, p + width_p)
            dq_KQD += _product(residual_KQP, sd[here, part_p])
            dd[here, part_p] = _product(residual_KQP.mT, sq[here]).mul_(scale_K11)
        dq[here] = dq_KQD.mul_(scale_K11)
    return dq, dd


def _product(a_KMN: Tensor, b_KND: Tensor) -> Tensor:
    """A batched matrix product with a float32 result, which half-precision residuals of any scale need."""
    if a_KMN.dtype == torch.float32:
        return torch.bmm(a_KMN, b_KND)
    if a_KMN.is_cuda:
        return torch.bmm(a_KMN, b_KND, out_dtype=torch.float32)
    return torch.bmm(a_KMN.float(), b_KND.float())


def _range(dtype: torch.dtype) -> float:
    return _FLOAT16_RANGE if dtype == torch.float16 else 1.0


def _chunks(layers: int, queries: int, passages: int, size: int, block: int) -> tuple[int, int]:
    """Layers and passages of one residual chunk: whole layers where one fits, else a multiple of the passage tile."""
    per_passage = queries * size
    if per_passage * passages <= _WORKSPACE:
        return min(layers, _WORKSPACE // (per_passage * passages)), passages
    return 1, min(passages, max(1, _WORKSPACE // (per_passage * block)) * block)


def _score_tiles(tq: Tensor, sq: Tensor, queries: int, passages: int, crowded: bool) -> ScoreTiles:
    size = max(tq.element_size(), sq.element_size())
    amount = "small" if queries * passages < (128 * 128) * 16 else "large, crowded" if crowded else "large"
    return tiles_for(_SCORES, architecture(tq))[size, amount]


def _bytes(mask: Tensor | None, block: int, unused: Tensor) -> Tensor:
    """The mask as bytes, its rows padded with zeros to a multiple of the tile; any tensor where the kernel reads none."""
    if mask is None:
        return unused
    return torch.nn.functional.pad(mask.contiguous().view(torch.uint8), (0, -mask.shape[1] % block))


def _score_constants(
    tiles: ScoreTiles, teacher_width: int, student_width: int, passages: int, has_mask: bool
) -> dict[str, Any]:
    return {
        "HAS_MASK": has_mask,
        "EVEN_PASSAGES": passages % tiles.passages == 0,
        "EVEN_TEACHER": teacher_width % tiles.width == 0,
        "EVEN_STUDENT": student_width % tiles.width == 0,
        "BLOCK_QUERIES": tiles.queries,
        "BLOCK_PASSAGES": tiles.passages,
        "BLOCK_WIDTH": tiles.width,
    }


def _gradient_tiles(capability: int, size: int, width: int) -> ScoreTiles:
    tiles = tiles_for(_GRADIENT, capability)[size]
    return tiles._replace(width=min(tiles.width, triton.next_power_of_2(width)))


def _gradient_constants(tiles: ScoreTiles, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "RANGE": _range(dtype),
        "BLOCK_QUERIES": tiles.queries,
        "BLOCK_PASSAGES": tiles.passages,
        "BLOCK_WIDTH": tiles.width,
    }


def aot_variants() -> Iterator[Variant]:
    """Every tile configuration of the Hopper table, on the shapes that select it."""
    counts: tuple[str, ...] = (
        "layers",
        "queries",
        "passages",
        "shares",
        "teacher_width",
        "student_width",
        "width",
        "tiles_per_share",
    )
    counts += ("map_stride", "map_size", "mask_stride")
    common: dict[str, str] = dict.fromkeys((*counts, "first_layer", "chunk_start", "chunk_passages"), "i32")
    common |= dict.fromkeys(("teacher_scale", "student_scale", "scale"), "fp32")
    common |= dict.fromkeys(("maps_ptr", "shares_ptr", "lse_ptr", "kl_ptr", "nll_ptr", "grad_ptr"), "*fp32")
    common |= {"target_ptr": "*i64", "mask_ptr": "*u8"}
    aligned_counts = ("teacher_width", "student_width", "width", "map_stride", "map_size", "mask_stride", "chunk_start")
    vectors = ("tq_ptr", "td_ptr", "sq_ptr", "sd_ptr", "dq_ptr", "dd_ptr", "residual_ptr")

    def variant(fn: Any, name: str, dtype: str, constexprs: dict[str, Any], tiles: ScoreTiles, dots: bool) -> Variant:
        known = common | dict.fromkeys(vectors, f"*{dtype}")
        return Variant(
            name=f"layer-kl-{name}",
            fn=fn,
            signature={key: known[key] for key in fn.arg_names if key in known},
            constexprs=constexprs,
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
            expects_wgmma=dots and dtype != "fp32",
            aligned=tuple(key for key in aligned_counts if key in fn.arg_names),
        )

    for dtype, torch_dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
        size = torch_dtype.itemsize
        for amount in ("small", "large"):
            # A width that ends inside a slice, and float16, which takes bfloat16's tiles, each in its hardest case only.
            hardest = (500, True)
            for width, cases in ((768, ((512, False), (500, False), hardest)), (400, (hardest,))):
                for passages, masked in cases[-1:] if dtype == "fp16" else cases:
                    name = f"{amount}-{dtype}-p{passages}-d{width}{'-masked' if masked else ''}"
                    for store, tempered in ((True, True),) if dtype == "fp16" else product((False, True), repeat=2):
                        crowded = amount == "large" and (masked or store)
                        tiles = _SCORES[90][size, amount + (", crowded" if crowded else "")]
                        constants = _score_constants(tiles, width, width, passages, masked) | {"PRECISION": "ieee"}
                        switches = {"STORE": store, "TEMPERED": tempered}
                        label = f"scores-{name}{'-stored' if store else ''}{'-tempered' if tempered else ''}"
                        yield variant(scores_kernel, label, dtype, constants | switches, tiles, True)
                    tiles = _SCORES[90][size, amount + (", crowded" if amount == "large" and masked else "")]
                    constants = _score_constants(tiles, width, width, passages, masked) | {"PRECISION": "ieee"}
                    constants["RANGE"] = _range(torch_dtype)
                    yield variant(residual_kernel, f"residual-{name}", dtype, constants, tiles, True)
        for width in (768, 64):
            tiles = _gradient_tiles(90, size, width)
            constants = _gradient_constants(tiles, torch_dtype) | {"PRECISION": "ieee"}
            yield variant(gradient_kernel, f"gradient-{dtype}-d{width}", dtype, constants, tiles, True)
    for block_shares in (1, 16, _MAX_SHARES):
        constants = {"TEMPERED": True, "BLOCK_SHARES": block_shares, "BLOCK_QUERIES": _COMBINE_ROWS}
        tiles = ScoreTiles(_COMBINE_ROWS, 0, 0, 4, 3)
        yield variant(combine_kernel, f"combine-{block_shares}", "fp32", constants, tiles, False)
