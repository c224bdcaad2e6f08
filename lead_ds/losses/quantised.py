"""A loss of the student's vectors as few bits hold them, so that these serve as well: straight-through.

Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lead_ds.losses.matryoshka import Change
from lead_ds.settings.roles import Quantize


def rounded(x_D: Tensor, how: Quantize) -> Tensor:
    """What is left of vectors [..., D] in `how` many bits; the gradient passes as if nothing were lost.

    int8: 255 steps between the largest magnitude of a vector and its negative. binary: signs, at the vector's own length.

    >>> rounded(torch.tensor([3.0, -4.0]), "binary").tolist()
    [3.535533905029297, -3.535533905029297]
    """
    if how == "int8":
        step_1 = x_D.detach().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        held_D = (x_D.detach() / step_1).round() * step_1
    else:
        length_1 = torch.linalg.vector_norm(x_D.detach(), dim=-1, keepdim=True)
        held_D = torch.where(x_D.detach() > 0, 1.0, -1.0).to(x_D) * length_1 / x_D.shape[-1] ** 0.5
    return x_D + (held_D - x_D).detach()


def held_in(how: Quantize) -> Change:
    """Vectors as `rounded`; scores stay as they are."""
    return lambda features: features.of_vectors(lambda x: rounded(x, how))
