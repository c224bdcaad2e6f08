"""Running a model over packed rows, in which several texts stand side by side and none sees another.

Attention is kept inside of a text by what keeps it so in the backend at hand: flash attention by the bounds of the texts
(nothing is computed across them), the others by a mask. Decoders make that mask themselves, from positions that begin anew
(transformers' `find_packed_sequence_indices`), so that their sliding windows are kept as well; encoders are given it.

Dimensions: B texts, L tokens, R rows, M tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lead_ds.data.passes import Tokens, packed
from lead_ds.errors import InputError

if TYPE_CHECKING:
    from lead_ds.models.scorer import Scorer

# Encoders that learned positions and attend to the whole text in every layer. RoBERTa's count from the padding id on.
_BERTS, _ROBERTAS = ("bert", "distilbert", "electra"), ("roberta", "xlm-roberta", "camembert")
_REMEDY = "set it to a number, 2 to 4, or to null"


def unpacked(state: Tensor, tokens: Tokens) -> Tensor:
    """The states [R, M, D] of packed rows text by text [B, L, D]; those of texts that are not packed as they are."""
    return state.flatten(0, 1)[tokens["places"]] if "places" in tokens else state


def packed_inputs(tokens: Tokens, backbone: Any, *, decoder: bool) -> dict[str, Any]:
    """What the backbone reads of packed rows beside their tokens."""
    config, positions_RM = backbone.config, tokens["position_ids"]
    first = config.pad_token_id + 1 if config.model_type in _ROBERTAS else 0
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


@torch.no_grad()
def check_packing(scorer: Scorer, says: Callable[[Tokens], Tensor], key: str) -> None:
    """Raise InputError, of the setting `key`, where a model is not known to read packed rows as it reads texts, or does not.

    says: what the scorer says of tokens from every layer [T + 1, B, ...]; run three times over a few texts, the same on
    every rank. Nobody can tell from a configuration whether an architecture mixes what stands in one row.
    """
    config = scorer.backbone.config
    kind = config.get_text_config().model_type
    if not (scorer.decoder and scorer.takes_positions) and config.model_type not in (*_BERTS, *_ROBERTAS):
        raise InputError(key, f"{kind} is not known to read several texts in a row", _REMEDY)
    # In half precision other shapes round otherwise; a text must not feel its neighbour by more than a reordered sum.
    alike, apart = (1e-3, 1e-4) if scorer.backbone.dtype is torch.float32 else (0.25, 0.01)
    generator, shape = torch.Generator().manual_seed(0), config.get_text_config()
    pad = shape.pad_token_id or 0
    lengths_B = torch.tensor([7, 3, 9, 1, 5])
    mask_BL = (torch.arange(9) < lengths_B[:, None]).long()
    ids_BL, others_BL = (torch.randint(shape.vocab_size - 1, mask_BL.shape, generator=generator) for _ in range(2))
    ids_BL, others_BL = ((x + (x >= pad)).where(mask_BL.bool(), pad) for x in (ids_BL, others_BL))  # none is padding
    texts = {"input_ids": ids_BL, "attention_mask": mask_BL}
    neighbours = texts | {"input_ids": torch.cat([others_BL[:1], ids_BL[1:]])}
    try:
        alone, beside, moved = says(texts), *(says(packed([t], pad).tokens[0]) for t in (texts, neighbours))
    except (RuntimeError, TypeError, ValueError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(key, f"{kind} cannot read several texts in a row: {told}", _REMEDY) from error
    if _difference(alone, beside) > alike or _difference(beside[:, 1:], moved[:, 1:]) > apart:
        what = f"{kind} with {config._attn_implementation} attention lets texts in one row see each other"
        raise InputError(key, what, _REMEDY)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest of any layer, of its size. NaN is no agreement."""
    sizes = one.float().flatten(1).norm(dim=1).clamp_min(1e-12)
    worst = ((one.float() - other.float()).flatten(1).norm(dim=1) / sizes).max()
    return float(worst.nan_to_num(nan=torch.inf))
