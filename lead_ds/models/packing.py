"""Running a model over packed rows, in which several texts stand side by side and none sees another.

What keeps attention inside of a text depends on the backend. Flash attention uses the bounds of the texts (nothing is
computed across them), the others a mask. Decoders make that mask themselves, from positions that begin again
(transformers' `find_packed_sequence_indices`), so that their sliding windows are kept as well; encoders are given it.

Dimensions: B texts, L tokens, R rows, M tokens of a row, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_ds.data.tokens.passes import Tokens

ROBERTAS = ("roberta", "xlm-roberta", "camembert")  # their positions count from the padding id on


def unpacked(state: Tensor, tokens: Tokens) -> Tensor:
    """The states [R, M, D] of packed rows text by text [B, L, D]; those of texts that are not packed as they are."""
    return state.flatten(0, 1)[tokens["places"]] if "places" in tokens else state


def packed_inputs(tokens: Tokens, backbone: Any, *, decoder: bool) -> dict[str, Any]:
    """What the backbone reads of packed rows beside their tokens."""
    config, positions_RM = backbone.config, tokens["position_ids"]
    first = config.pad_token_id + 1 if config.model_type in ROBERTAS else 0
    inputs: dict[str, Any] = {"position_ids": positions_RM + first}
    if "flash" in config._attn_implementation:
        bounds, longest = tokens["bounds"], tokens["places"].shape[1]
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    elif not decoder:
        text_RM = (positions_RM == 0).cumsum(1)
        mask_R1MM = (text_RM[:, None, :, None] == text_RM[:, None, None, :]).contiguous()
        if config._attn_implementation == "eager":  # which adds its mask
            hidden = torch.finfo(backbone.dtype).min
            mask_R1MM = torch.zeros_like(mask_R1MM, dtype=backbone.dtype).masked_fill(~mask_R1MM, hidden)
        inputs["attention_mask"] = mask_R1MM
    return inputs
