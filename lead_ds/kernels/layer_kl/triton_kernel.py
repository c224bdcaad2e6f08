# mypy: allow-untyped-defs, allow-incomplete-defs
"""Layer-relevance KL in Triton, all layer pairs in one launch.

Forward: every program walks a share of the passages for one tile of queries and keeps, per row and side, a running
maximum, sum and centred KL sum. A second kernel merges the shares. Backward: for small batches both gradients come from
one launch that reads the stored scores. Otherwise the residual R - P is recomputed into a bounded workspace, half
precision, and multiplied by the vendor's matrix product.

Dimensions: K layer pairs, Q queries, P passages, D width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lead_ds.kernels.aot import Variant
from lead_ds.kernels.dispatch import float32_dot_precision, processor_count, shared_memory, tiles_for
from lead_ds.kernels.launch import launch
from lead_ds.kernels.layer_kl import chunked
from lead_ds.kernels.layer_kl.backward_programs import gradient_kernel, residual_kernel
from lead_ds.kernels.layer_kl.forward_programs import combine_kernel, scores_kernel
from lead_ds.kernels.layer_kl.inputs import Factors, Problem, saved_shapes, stores_maps
from lead_ds.kernels.layer_kl.score_tiles import STATISTICS
from lead_ds.kernels.layer_kl.tiles import GRADIENT, SCORES, ScoreTiles
from lead_ds.kernels.products import wide_product
from lead_ds.kernels.vectors import aligned, inverse_lengths, through_lengths

# float16 holds probabilities below 6e-5 badly: residuals are stored this much larger, and divided by it in float32.
_FLOAT16_RANGE = 2.0**15

_MAX_SHARES = 64
_COMBINE_ROWS = 32
# Bytes of residuals that the backward pass holds at once.
_WORKSPACE = 64 << 20


def forward(problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(kl [K], teacher_nll [K], saved maps, saved log-sum-exps); what is saved is described in `inputs.saved_shapes`."""
    layers, queries, passages = problem.shape
    maps_shape, lse_shape = saved_shapes(problem, "triton", differentiable)
    new: dict[str, Any] = {"dtype": torch.float32, "device": problem.student.q.device}
    maps = torch.empty(maps_shape, **new)
    if layers * queries * passages == 0:
        kl, nll, _, _ = chunked.forward(problem.plain(), False)
        return kl, nll, maps, torch.empty(lse_shape, **new)
    scores = _scores(problem)
    lse = torch.empty((2, layers, queries), **new)
    store, tempered = len(maps_shape) == 4, problem.teacher.temperature != 1.0
    tiles = _score_tiles(problem, scores.extras + store)
    query_tiles, passage_tiles = triton.cdiv(queries, tiles.queries), triton.cdiv(passages, tiles.passages)
    # About eight programs a multiprocessor, or one tile each where there are fewer tiles than that.
    wanted = min(_MAX_SHARES, max(1, 8 * processor_count(lse) // (layers * query_tiles)))
    tiles_per_share = triton.cdiv(passage_tiles, wanted)
    shares = triton.cdiv(passage_tiles, tiles_per_share)
    statistics = torch.empty((layers, shares, STATISTICS.value, queries), **new)
    mask_bytes = _bytes(problem.mask, tiles.passages, scores.target)
    launch(
        scores_kernel, (query_tiles, shares, layers), *scores.vectors, *scores.inverses, scores.target, mask_bytes,
        maps if store else statistics, statistics, queries, passages, *scores.widths, maps.shape[-1],
        maps.numel() // 2, mask_bytes.stride(0), tiles_per_share, *scores.scales, **_score_constants(tiles, scores),
        STORE=store, TEMPERED=tempered, PRECISION=float32_dot_precision(), num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    blocks = triton.cdiv(queries, _COMBINE_ROWS)
    kl, nll = torch.empty((layers, blocks), **new), torch.empty((layers, blocks), **new)
    launch(
        combine_kernel, (layers, blocks), statistics, lse, kl, nll, layers, queries, shares, TEMPERED=tempered,
        BLOCK_SHARES=triton.next_power_of_2(shares), BLOCK_QUERIES=_COMBINE_ROWS, num_warps=4,
    )  # fmt: skip
    if blocks == 1:
        kl, nll = kl.view(layers), nll.view(layers)
    else:
        kl, nll = kl.sum(dim=1), nll.sum(dim=1)
    return kl, nll, maps, lse if lse_shape == lse.shape else lse.new_empty(lse_shape)


def backward(grad: Tensor, problem: Problem, maps: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's q and d: dS = g_k / (Q T_s) (R - P), dq = dS d, dd = dS^T q; and of its row_scale."""
    layers, queries, passages = problem.shape
    student = problem.student
    if layers * queries * passages == 0:
        scale = maps.new_zeros(0 if student.row_scale is None else student.row_scale.shape)
        return torch.zeros_like(student.q), torch.zeros_like(student.d), scale
    scores = _scores(problem)
    grad = (grad.float() * (1.0 / (queries * student.temperature))).contiguous()
    weights: tuple[Tensor, Tensor] = (lse, lse)
    if scores.scaled[1]:
        # A score's gradient times the inverses of its query and passage is what multiplies q and d. Relative to each
        # layer's largest, they leave the residual in the range of 16 bits; the largest follow with the layer's gradient.
        tops = [inverse.amax(dim=1, keepdim=True).clamp_min(1e-30) for inverse in scores.inverses[2:]]
        weights = scores.inverses[2] / tops[0], scores.inverses[3] / tops[1]
        grad = grad * tops[0][:, 0] * tops[1][:, 0]
    maps, lse = maps.contiguous(), lse.contiguous()
    if stores_maps(layers, queries, passages):
        dq, dd = _from_maps(grad, scores, weights, maps, lse)
    else:
        dq, dd = _recomputed(grad, problem, scores, weights, lse)
    dscale = lse.new_empty(0)
    if student.row_scale is not None:  # the sum over passages of a logit's gradient times its product, which dq . q is
        dscale = (dq * scores.vectors[2]).sum(-1) / scores.inverses[2]
    elif student.cosine:
        dq = through_lengths(dq, scores.vectors[2], scores.inverses[2])
        dd = through_lengths(dd, scores.vectors[3], scores.inverses[3])
    width = student.q.shape[2]
    dq, dd = (x[..., :width].to(student.q.dtype).contiguous() for x in (dq, dd))
    return dq, dd, dscale


class _Scores(NamedTuple):
    """What every kernel that computes scores reads: tq, td, sq, sd; where a model's are scaled, by what: 1 / lengths, say."""

    vectors: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]
    target: Tensor
    scales: tuple[float, float]
    scaled: tuple[bool, bool]
    masked: bool

    @property
    def widths(self) -> tuple[int, int]:
        """Of the teacher's and of the student's vectors."""
        return self.vectors[0].shape[2], self.vectors[2].shape[2]

    @property
    def extras(self) -> int:
        """How many things beside the two tiles of scores want registers: a mask, scales."""
        return int(self.masked) + any(self.scaled)


def _scores(problem: Problem) -> _Scores:
    sides = problem.teacher, problem.student
    vectors = tuple(aligned(x) for side in sides for x in side[:2])
    target = problem.target.contiguous()
    inverses = tuple(x for i, side in enumerate(sides) for x in _inverses(side, *vectors[2 * i : 2 * i + 2]))
    scales = 1.0 / sides[0].temperature, 1.0 / sides[1].temperature
    return _Scores(vectors, inverses, target, scales, (sides[0].scaled, sides[1].scaled), problem.mask is not None)


def _inverses(side: Factors, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """What scores are multiplied by, a number of each query and of each passage; any tensors where the kernel reads none."""
    if side.row_scale is not None:
        return side.row_scale.float().contiguous(), torch.ones(d.shape[:2], dtype=torch.float32, device=d.device)
    return (inverse_lengths(q), inverse_lengths(d)) if side.cosine else (q, d)


def _from_maps(
    grad: Tensor, scores: _Scores, weights: tuple[Tensor, Tensor], maps: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    sq, sd = scores.vectors[2:]
    layers, queries, width = sq.shape
    passages = sd.shape[1]
    dq, dd = _new_gradients(scores)
    tiles = _gradient_tiles(shared_memory(sq), sq.element_size(), width)
    row_tiles = triton.cdiv(queries, tiles.queries) + triton.cdiv(passages, tiles.passages)
    launch(
        gradient_kernel, (row_tiles, triton.cdiv(width, tiles.width), layers), maps, lse, grad, sq, sd, *weights, dq,
        dd, layers, queries, passages, width, maps.shape[-1], maps.numel() // 2,
        **_gradient_constants(tiles, sq.dtype, scores.scaled[1]), PRECISION=float32_dot_precision(),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dq, dd


def _recomputed(
    grad: Tensor, problem: Problem, scores: _Scores, weights: tuple[Tensor, Tensor], lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Residuals of as many layers, or as much of one layer, as the workspace holds; then two matrix products of each."""
    layers, queries, passages = problem.shape
    sq, sd = scores.vectors[2:]
    tiles = _score_tiles(problem, scores.extras)
    chunk_k, chunk_p = _chunks(layers, queries, passages, sq.element_size(), tiles.passages)
    residual_range = _range(sq.dtype)
    workspace = torch.empty(chunk_k * queries * chunk_p, dtype=sq.dtype, device=sq.device)
    dq, dd = _new_gradients(scores)
    mask_bytes = _bytes(problem.mask, tiles.passages, scores.target)
    for k in range(0, layers, chunk_k):
        here = slice(k, min(k + chunk_k, layers))
        count = here.stop - k
        scale_K11 = (grad[here] / residual_range)[:, None, None]
        dq_KQD = torch.zeros((count, queries, sq.shape[2]), dtype=torch.float32, device=sq.device)
        for p in range(0, passages, chunk_p):
            width_p = min(chunk_p, passages - p)
            residual_KQP = workspace[: count * queries * width_p].view(count, queries, width_p)
            launch(
                residual_kernel, (triton.cdiv(queries, tiles.queries), triton.cdiv(width_p, tiles.passages), count),
                *scores.vectors, *scores.inverses, *weights, scores.target, mask_bytes, lse, residual_KQP, layers,
                queries, passages, *scores.widths, mask_bytes.stride(0), k, p, width_p, *scores.scales,
                **_score_constants(tiles, scores), RANGE=residual_range, PRECISION=float32_dot_precision(),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            part_p = slice(p, p + width_p)
            dq_KQD += wide_product(residual_KQP, sd[here, part_p])
            dd[here, part_p] = wide_product(residual_KQP.mT, sq[here]).mul_(scale_K11)
        dq[here] = dq_KQD.mul_(scale_K11)
    return dq, dd


def _new_gradients(scores: _Scores) -> tuple[Tensor, Tensor]:
    """Room for the gradients of the student's q and d; in float32 where the share of what scales them is still to follow."""
    sq, sd = scores.vectors[2:]
    dtype = torch.float32 if scores.scaled[1] else sq.dtype
    return torch.empty_like(sq, dtype=dtype), torch.empty_like(sd, dtype=dtype)


def _range(dtype: torch.dtype) -> float:
    return _FLOAT16_RANGE if dtype == torch.float16 else 1.0


def _chunks(layers: int, queries: int, passages: int, size: int, block: int) -> tuple[int, int]:
    """Layers and passages of one residual chunk: whole layers where one fits, else a multiple of the passage tile."""
    per_passage = queries * size
    if per_passage * passages <= _WORKSPACE:
        return min(layers, _WORKSPACE // (per_passage * passages)), passages
    return 1, min(passages, max(1, _WORKSPACE // (per_passage * block)) * block)


def _score_tiles(problem: Problem, extras: int) -> ScoreTiles:
    _, queries, passages = problem.shape
    size = max(problem.teacher.q.element_size(), problem.student.q.element_size())
    large = queries * passages >= (128 * 128) * 16
    return tiles_for(SCORES, shared_memory(problem.student.q))[size, _amount(large, extras)]


def _amount(large: bool, extras: int) -> str:
    """Which tiles: `extras` of a mask, lengths and storing the scores want registers beside the scores."""
    if not large or extras == 3:
        return "small"
    return "large, crowded" if extras else "large"


def _bytes(mask: Tensor | None, block: int, unused: Tensor) -> Tensor:
    """The mask as bytes, its rows padded with zeros to a multiple of the tile; any tensor where the kernel reads none."""
    if mask is None:
        return unused
    return torch.nn.functional.pad(mask.contiguous().view(torch.uint8), (0, -mask.shape[1] % block))


def _score_constants(tiles: ScoreTiles, scores: _Scores) -> dict[str, Any]:
    passages = scores.vectors[1].shape[1]
    return {
        "HAS_MASK": scores.masked,
        # The mask hides what is past the end, too.
        "EVEN_PASSAGES": not scores.masked and passages % tiles.passages == 0,
        "TEACHER_SCALED": scores.scaled[0],
        "STUDENT_SCALED": scores.scaled[1],
        "EVEN_TEACHER": scores.widths[0] % tiles.width == 0,
        "EVEN_STUDENT": scores.widths[1] % tiles.width == 0,
        "BLOCK_QUERIES": tiles.queries,
        "BLOCK_PASSAGES": tiles.passages,
        "BLOCK_WIDTH": tiles.width,
    }


def _gradient_tiles(shared: int, size: int, width: int) -> ScoreTiles:
    tiles = tiles_for(GRADIENT, shared)[size]
    return tiles._replace(width=min(tiles.width, triton.next_power_of_2(width)))


def _gradient_constants(tiles: ScoreTiles, dtype: torch.dtype, scaled: bool) -> dict[str, Any]:
    return {
        "RANGE": _range(dtype),
        "STUDENT_SCALED": scaled,
        "BLOCK_QUERIES": tiles.queries,
        "BLOCK_PASSAGES": tiles.passages,
        "BLOCK_WIDTH": tiles.width,
    }


def aot_variants(shared: int) -> Iterator[Variant]:
    """Every tile configuration for so much shared memory a block, on the shapes that select it."""
    counts: tuple[str, ...] = ("layers", "queries", "passages", "shares", "teacher_width", "student_width", "width")
    counts += (
        "tiles_per_share",
        "map_stride",
        "map_size",
        "mask_stride",
        "first_layer",
        "chunk_start",
        "chunk_passages",
    )
    common: dict[str, str] = dict.fromkeys(counts, "i32")
    common |= dict.fromkeys(("teacher_scale", "student_scale"), "fp32")
    common |= dict.fromkeys(("maps_ptr", "shares_ptr", "lse_ptr", "kl_ptr", "nll_ptr", "grad_ptr"), "*fp32")
    sides = [f"{side}_{what}_ptr" for side in ("tq", "td", "sq", "sd") for what in ("inverse", "weight")]
    common |= dict.fromkeys(sides, "*fp32") | {"target_ptr": "*i64", "mask_ptr": "*u8"}
    aligned_counts = ("teacher_width", "student_width", "width", "map_stride", "map_size", "mask_stride")
    vectors = ("tq_ptr", "td_ptr", "sq_ptr", "sd_ptr", "residual_ptr")

    def variant(fn: Any, name: str, dtype: str, constexprs: dict[str, Any], tiles: ScoreTiles, dots: bool) -> Variant:
        scaled = constexprs.get("STUDENT_SCALED", False)
        known = common | dict.fromkeys(vectors, f"*{dtype}")
        known |= dict.fromkeys(("dq_ptr", "dd_ptr"), "*fp32" if scaled else f"*{dtype}")
        return Variant(
            name=f"layer-kl-{name}{'-scaled' if scaled else ''}",
            fn=fn,
            signature={key: known[key] for key in fn.arg_names if key in known},
            constexprs=constexprs | ({"PRECISION": "ieee"} if dots else {}),
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
            expects_wgmma=dots and dtype != "fp32",
            aligned=tuple(key for key in aligned_counts if key in fn.arg_names),
        )

    for dtype, torch_dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
        size = torch_dtype.itemsize
        # Plain; ending inside a tile; masked, tempered and, in the last, scales, at a width that ends inside a slice.
        cases = ((768, 512, False, False), (768, 500, False, False), (768, 500, True, False), (400, 500, True, True))
        for amount in ("small", "large"):
            for width, passages, masked, scaled in cases[-1:] if dtype == "fp16" else cases:
                vector = torch.empty(1, passages, width, device="meta")
                scores = _Scores((vector,) * 4, (), vector, (1.0, 1.0), (scaled, scaled), masked)
                name = f"{amount}-{dtype}-p{passages}-d{width}{'-masked' if masked else ''}"
                for store in (False, True):
                    tiles = tiles_for(SCORES, shared)[size, _amount(amount == "large", scores.extras + store)]
                    constants = _score_constants(tiles, scores) | {"STORE": store, "TEMPERED": masked}
                    yield variant(scores_kernel, f"scores-{name}{'-stored' * store}", dtype, constants, tiles, True)
                tiles = tiles_for(SCORES, shared)[size, _amount(amount == "large", scores.extras)]
                constants = _score_constants(tiles, scores) | {"RANGE": _range(torch_dtype)}
                yield variant(residual_kernel, f"residual-{name}", dtype, constants, tiles, True)
        for width, scaled in ((768, False), (64, False), (768, True)):
            tiles = _gradient_tiles(shared, size, width)
            constants = _gradient_constants(tiles, torch_dtype, scaled)
            yield variant(gradient_kernel, f"gradient-{dtype}-d{width}", dtype, constants, tiles, True)
    for block_shares in (1, 16, _MAX_SHARES):
        constants = {"TEMPERED": True, "BLOCK_SHARES": block_shares, "BLOCK_QUERIES": _COMBINE_ROWS}
        tiles = ScoreTiles(_COMBINE_ROWS, 0, 0, 4, 3)
        yield variant(combine_kernel, f"combine-{block_shares}", "fp32", constants, tiles, False)
