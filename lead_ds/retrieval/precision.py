"""A model's matrix products in fewer bits than float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lead_ds.data.tokens.encoder import Tokens
from lead_ds.errors import InputError

Embed = Callable[[Tokens], Tensor]
"""Tokens on the model's device -> final vectors [B, D]: `DualEncoder.embed`, or a sharded engine called with `tokens=`."""

Precision = Literal["fp32", "bf16", "fp16"]


def in_precision(embed: Embed, precision: Precision, device: torch.device | str) -> Embed:
    """`embed` with its matrix products in `precision`; norms and softmax stay in float32 (torch.autocast).

    Raises InputError where the device cannot.
    """
    if precision == "fp32":
        return embed
    kind, dtype = torch.device(device).type, torch.bfloat16 if precision == "bf16" else torch.float16
    if kind == "cpu" and precision == "fp16":
        raise InputError("precision", "fp16 is for GPUs", "use bf16 or fp32")
    if kind == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("precision", "this GPU has no bf16", "use fp16 or fp32")

    def embed_mixed(tokens: Tokens) -> Tensor:
        with torch.autocast(kind, dtype):
            return embed(tokens)

    return embed_mixed
