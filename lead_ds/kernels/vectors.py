"""How tensors are laid out for the Triton kernels, and the lengths of vectors that are compared by their cosine."""

import torch
from torch import Tensor

_WIDTH_MULTIPLE = 16
# As in `torch.nn.functional.normalize`: a vector shorter than this has no direction.
_SHORTEST = 1e-12


def aligned(vectors: Tensor) -> Tensor:
    """The same vectors, contiguous and with a width that is a multiple of 16: a copy, with zeros added, for odd widths only.

    Every row then starts where a 16-byte access may; products are unchanged.
    """
    missing = -vectors.shape[-1] % _WIDTH_MULTIPLE
    return (vectors if missing == 0 else torch.nn.functional.pad(vectors, (0, missing))).contiguous()


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] of length 1, in float32 (float64 for float64)."""
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    return torch.nn.functional.normalize(wide, dim=-1)


def inverse_lengths(vectors: Tensor) -> Tensor:
    """1 / length of vectors [..., D], in float32: what makes their products cosines. 0 for a vector without a length."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32)
    return torch.where(lengths < _SHORTEST, 0.0, lengths.reciprocal())


def through_lengths(grad: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
    """The gradient to `vectors` [..., D], from float32 `grad`, their gradient where their lengths are held constant.

    A vector's own direction drops out: g - (g . u) u with the unit vector u.
    """
    unit_vectors = vectors.float() * inverse[..., None]
    along = (grad * unit_vectors).sum(-1, keepdim=True)
    return torch.addcmul(grad, along, unit_vectors, value=-1).to(vectors.dtype)
