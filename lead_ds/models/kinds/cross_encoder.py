"""A cross-encoder: its classification head, read on every selected layer.

Dimensions: K selected layers, B pairs, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lead_ds.models.heads import check_labels, classification_head, relevance_logit
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.pair_scorer import PairScorer
from lead_ds.models.pooling import pool
from lead_ds.settings.model import ModelConfig, PairConfig

if TYPE_CHECKING:
    from lead_ds.data.tokens.encoder import Tokens


class CrossEncoderConfig(PairConfig):
    """A cross-encoder: no more than every model of pairs has."""

    kind: Literal["cross_encoder"] = "cross_encoder"


@KINDS.register("cross_encoder")
class CrossEncoder(PairScorer):
    """Scores of query-passage pairs. One label: its logit; two: logit[1] - logit[0].

    Only the state that the head reads is kept of a layer; the head runs once, on the layers and the final state together.
    """

    kind = "cross_encoder"
    Settings = CrossEncoderConfig

    def __init__(self, model: Any, config: ModelConfig) -> None:
        super().__init__(model, config)
        check_labels(model.config.num_labels, config.path)
        classification_head(model, config.path)  # an unknown family is told now

    def _scores(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        head = classification_head(self.model, self.config.path)
        mask_BL, pooling = tokens["attention_mask"], head.pooling
        read = self.run(tokens, layers, lambda state: pool(state, mask_BL, pooling), through_norm=pooling == "mean")
        logits = head.logits(torch.cat(read))
        scores_KB = relevance_logit(logits).unflatten(0, (len(read), -1))
        return scores_KB if self.lens is None else self.lens(scores_KB, read, layers)
