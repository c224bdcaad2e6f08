"""A cross-encoder: its classification head, read on every selected layer.

Dimensions: K selected layers, Q queries, N passages of each query, B = Q * N pairs, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lead_ds.config import ModelConfig
from lead_ds.models.heads import check_labels, classification_head, relevance_logit
from lead_ds.models.pooling import pool
from lead_ds.models.scorer import Output, Scorer
from lead_ds.relevance import ScoreFeatures

if TYPE_CHECKING:
    from lead_ds.data.batches import ModelBatch
    from lead_ds.data.tokens import Tokens


class CrossEncoder(Scorer):
    """Scores of query-passage pairs. One label: its logit; two: logit[1] - logit[0].

    Only the state that the head reads is kept of a layer; the head runs once, on the layers and the final state together.
    """

    kind = "cross_encoder"
    scope = "group"

    def __init__(self, model: Any, config: ModelConfig) -> None:
        super().__init__(model, config)
        check_labels(model.config.num_labels, config.path)
        classification_head(model, config.path)  # an unknown family is told now

    def forward(
        self,
        batch: ModelBatch | None = None,
        layers: Sequence[int] = (),
        tap_layers: Sequence[int] = (),
        *,
        tokens: Tokens | None = None,
    ) -> Any:
        """Output with ScoreFeatures of a batch's pairs; or the final scores [B] of `tokens`, with `layers` those of the
        layers and then the final ones [K + 1, B]."""
        if tokens is not None:
            scores_KB = self._scores(tokens, layers)
            return scores_KB if layers else scores_KB[-1]
        assert batch is not None
        assert batch.pairs is not None
        with self.tapping(tap_layers) as taps:
            if batch.passes is not None:
                scores_KB = self.in_passes(batch.passes, lambda tokens: self._scores(tokens, layers))
            else:
                scores_KB = self._scores(batch.pairs, layers)
        s_KQN = scores_KB.unflatten(1, (-1, batch.group))
        scale = self.config.scale
        return Output(
            final=ScoreFeatures(s_KQN[-1:], self.final_scale),
            layers=ScoreFeatures(s_KQN[:-1], scale) if layers else None,
            taps_queries=None,
            taps_passages=taps,
        )

    def _scores(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """[K + 1, B]: the layers asked for, then the final score."""
        head = classification_head(self.model, self.config.path)
        mask_BL, pooling = tokens["attention_mask"], head.pooling
        read = self.run(tokens, layers, lambda state: pool(state, mask_BL, pooling), through_norm=pooling == "mean")
        logits = head.logits(torch.cat(read))
        scores_KB = relevance_logit(logits).unflatten(0, (len(read), -1))
        return scores_KB if self.lens is None else self.lens(scores_KB, read, layers)
