"""How tensors are laid out for the Triton kernels."""

import torch
from torch import Tensor

_WIDTH_MULTIPLE = 16


def aligned(vectors: Tensor) -> Tensor:
    """The same vectors, contiguous and with a width that is a multiple of 16: a copy, with zeros added, for odd widths only.

    Every row then starts where a 16-byte access may; products are unchanged.
    """
    missing = -vectors.shape[-1] % _WIDTH_MULTIPLE
    return vectors.contiguous() if missing == 0 else torch.nn.functional.pad(vectors, (0, missing))
