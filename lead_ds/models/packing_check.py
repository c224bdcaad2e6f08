"""Whether a model reads packed rows as it reads texts: a configuration does not show it, so it is tried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lead_ds.data.tokens.passes import Tokens, packed
from lead_ds.errors import InputError
from lead_ds.models.packing import ROBERTAS
from lead_ds.models.scorer import Scorer

_BERTS = (
    "bert",
    "distilbert",
    "electra",
)  # encoders that learned positions and attend to the whole text in every layer
_REMEDY = "set it to a number, 2 to 4, or to null"


@torch.no_grad()
def check_packing(scorer: Scorer, says: Callable[[Tokens], Tensor], key: str) -> None:
    """Raise InputError, of the setting `key`, where a model is not known to read packed rows as it reads texts, or does not.

    says: what the scorer gives for tokens from every layer [T + 1, B, ...]; run three times over a few texts, the same
    on every rank. A configuration does not show whether an architecture mixes what stands in one row.
    """
    config = scorer.backbone.config
    kind = config.get_text_config().model_type
    if not (scorer.decoder and scorer.takes_positions) and config.model_type not in (*_BERTS, *ROBERTAS):
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(key, f"{kind} cannot read several texts in a row: {reason}", _REMEDY) from error
    if _difference(alone, beside) > alike or _difference(beside[:, 1:], moved[:, 1:]) > apart:
        what = f"{kind} with {config._attn_implementation} attention lets texts in one row see each other"
        raise InputError(key, what, _REMEDY)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest of any layer, of its size. NaN is no agreement."""
    sizes = one.float().flatten(1).norm(dim=1).clamp_min(1e-12)
    worst = ((one.float() - other.float()).flatten(1).norm(dim=1) / sizes).max()
    return float(worst.nan_to_num(nan=torch.inf))
