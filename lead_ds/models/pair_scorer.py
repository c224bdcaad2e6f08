"""What models of query-passage pairs share: a score of each pair from every selected layer.

Dimensions: K selected layers, Q queries, N passages of each query, B = Q * N pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lead_ds.models.kinds.kind import Kind
from lead_ds.models.scorer import Output
from lead_ds.relevance import ScoreFeatures

if TYPE_CHECKING:
    from lead_ds.data.reads import ModelBatch
    from lead_ds.data.tokens.encoder import Tokens


class PairScorer(Kind):
    """Reads a query and a passage as one text: relevance is defined within a query's own passages."""

    scope = "group"
    reads_pairs = True
    lens_form = "scores"

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

    @abstractmethod
    def _scores(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """[K + 1, B]: the layers asked for, then the final score."""
