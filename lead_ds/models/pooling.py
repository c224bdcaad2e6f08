"""One vector of a text's token states: the first token, the last, or their mean. Padding on either side.

Dimensions: B texts, L tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PoolingMode = Literal["cls", "mean", "last"]


def pool(states_BLD: Tensor, mask_BL: Tensor, mode: PoolingMode) -> Tensor:
    """[B, L, D] token states and [B, L] mask (1: a real token) -> [B, D], in the states' dtype.

    A copy, never a view: a view would keep every token's state alive. Sums are accumulated in float32 by the product.
    """
    if mode == "mean":
        weights_B1L = mask_BL.to(states_BLD.dtype).unsqueeze(1)
        count_B1 = mask_BL.sum(1, keepdim=True).clamp_min(1).float()  # bfloat16 cannot count to 257
        return (torch.bmm(weights_B1L, states_BLD).squeeze(1) / count_B1).to(states_BLD.dtype)
    position_B = first_token(mask_BL) if mode == "cls" else last_token(mask_BL)
    return states_BLD[torch.arange(states_BLD.shape[0], device=states_BLD.device), position_B]


def first_token(mask_BL: Tensor) -> Tensor:
    """Position [B] of each row's first real token."""
    return mask_BL.long().argmax(1)


def last_token(mask_BL: Tensor) -> Tensor:
    """Position [B] of each row's last real token."""
    return mask_BL.long().cumsum(1).argmax(1)
