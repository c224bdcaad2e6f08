"""Vectors in few bits: int8 calibrated on a sample, or signs alone; and what they stand for.

sentence-transformers quantises (`quantize_embeddings`), so that what it reads and what is written here are the same bytes.

D width of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL: tuple[str, ...] = ("int8", "binary", "ubinary")
CALIBRATED_ON = 4096  # vectors, at even distances
RESCORED = 4  # times k: candidates by signs that are scored again
_AT_ONCE = 1 << 24  # elements of candidates' vectors


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """[2, D]: the least and the largest of each dimension, of a sample [n, D]; float32."""
    return np.stack([vectors.min(0), vectors.max(0)]).astype(np.float32)


def quantise(vectors: np.ndarray, how: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """[n, D] floats as int8 [n, D], or as packed signs [n, ceil(D / 8)], int8 (binary) or uint8 (ubinary).

    ranges: of int8, as `ranges_of`; what lies beyond is clipped.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    made: Any = quantize_embeddings(vectors, precision=how, ranges=ranges)  # type: ignore[arg-type]
    return np.asarray(made)


def restored(block: np.ndarray, how: str, width: int, ranges: np.ndarray | None = None) -> np.ndarray:
    """What `quantise` made [n, *], as float32 [n, D]: the middle of each step; of signs 1 and -1, over the root of D."""
    if how == "int8":
        assert ranges is not None
        steps = (ranges[1] - ranges[0]) / 255
        return ((block.astype(np.float32) + 128.5) * steps + ranges[0]).astype(np.float32)
    bits = np.unpackbits(unsigned(block), axis=-1)[:, :width]
    return ((bits.astype(np.float32) * 2 - 1) / width**0.5).astype(np.float32)


def unsigned(block: np.ndarray) -> np.ndarray:
    """Packed signs as uint8, which FAISS reads, whichever they are written as."""
    return block if block.dtype == np.uint8 else (block.astype(np.int16) + 128).astype(np.uint8)


def bytes_of(how: str, width: int) -> int:
    """Of one vector."""
    return {"float32": 4 * width, "float16": 2 * width, "int8": width}.get(how, -(-width // 8))


def rescore(queries_QD: Tensor, rows_Qn: Tensor, vectors: Any, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query's candidates `rows` (-1: none) by inner product with `vectors(rows)` [n, D]."""
    width, found = queries_QD.shape[1], []
    step = max(1, _AT_ONCE // max(1, rows_Qn.shape[1] * width))
    for start in range(0, len(rows_Qn), step):
        some_Qn, part_QD = rows_Qn[start : start + step], queries_QD[start : start + step]
        held_QnD = vectors(some_Qn.clamp_min(0).flatten()).unflatten(0, some_Qn.shape)
        scores_Qn = torch.einsum("qd,qnd->qn", part_QD.float(), held_QnD.float())
        scores_Qn = scores_Qn.masked_fill(some_Qn < 0, -torch.inf)
        scores_Qk, places_Qk = scores_Qn.topk(min(k, scores_Qn.shape[1]), dim=1)
        found.append((scores_Qk, some_Qn.gather(1, places_Qk)))
    return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])
