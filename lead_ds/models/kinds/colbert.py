"""Late interaction: a vector per token, relevance their MaxSim.

Dimensions: K selected layers, Q queries, P passages, B texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lead_ds.models.dense import Dense
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.models.scorer import Output
from lead_ds.relevance import Scale, TokenFeatures
from lead_ds.settings.base import Positive
from lead_ds.settings.model import ModelConfig, TextConfig

if TYPE_CHECKING:
    from lead_ds.data.reads import ModelBatch
    from lead_ds.data.tokens.encoder import Tokens


class ColBERTConfig(TextConfig):
    """A late-interaction model: what its token states become, and which of them count."""

    kind: Literal["colbert"] = "colbert"
    normalize: bool | None = Field(None, description="unit-length token vectors; null: as its files say, else false")
    query_expansion: bool | None = Field(
        None, description="pad queries to query_length with mask tokens that count; null: as its files say"
    )
    mask_punctuation: bool | None = Field(
        None, description="punctuation tokens of a passage never match; null: as its files say"
    )
    token_dim: Positive | None = Field(None, description="width of a new token projection; null: none")

    @field_validator("passes")
    @classmethod
    def _passes(cls, value: int | str | None) -> int | str | None:
        if value == "packed":
            raise ValueError("packed keeps one state of a text, colbert compares all: set a number")
        return value


@KINDS.register("colbert")
class ColBERT(Kind):
    """Token states, then Dense layers if any, then unit length if `normalize`: of the final state and of every layer alike.

    Which tokens count is the tokens' `score_mask` (query expansion, punctuation), else their `attention_mask`.
    """

    kind = "colbert"
    scope = "batch"
    Settings = ColBERTConfig

    def __init__(self, model: Any, config: ModelConfig, dense: Sequence[Dense] = (), normalize: bool = False) -> None:
        super().__init__(model, config)
        self.normalize = normalize
        self.dense = nn.ModuleList(dense)
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    def forward(
        self,
        batch: ModelBatch | None = None,
        layers: Sequence[int] = (),
        tap_layers: Sequence[int] = (),
        *,
        tokens: Tokens | None = None,
    ) -> Any:
        """Output with TokenFeatures of a batch's queries and passages; or the final token vectors [B, L, D] of `tokens`,
        with `layers` those of the layers and then the final ones [K + 1, B, L, D]."""
        if tokens is not None:
            states = self._states(tokens, layers)
            return states if layers else states[-1]
        assert batch is not None
        assert batch.queries is not None
        assert batch.passages is not None
        q_mask, p_mask = score_mask(batch.queries), score_mask(batch.passages)
        taps_queries = taps_passages = None
        if batch.passes is not None:
            states = self.in_passes(batch.passes, lambda tokens: self._states(tokens, layers))
            (count, q_length), p_length = q_mask.shape, p_mask.shape[1]
            queries, passages = states[:, :count, :q_length], states[:, count:, :p_length]
        else:
            with self.tapping(tap_layers) as taps_queries:
                queries = self._states(batch.queries, layers)
            with self.tapping(tap_layers) as taps_passages:
                passages = self._states(batch.passages, layers)

        def features(part: slice, scale: Scale) -> TokenFeatures:
            return TokenFeatures(queries[part], q_mask, passages[part], p_mask, scale)

        return Output(
            final=features(slice(-1, None), self.final_scale),
            layers=features(slice(0, -1), self.config.scale) if layers else None,
            taps_queries=taps_queries,
            taps_passages=taps_passages,
        )

    def _states(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """[K + 1, B, L, D]: the layers asked for, then the final states."""
        return torch.stack(self.run(tokens, layers, self._read_out, through_norm=True))

    def _read_out(self, state_BLD: Tensor) -> Tensor:
        for dense in self.dense:
            state_BLD = dense(state_BLD)
        return nn.functional.normalize(state_BLD, dim=-1) if self.normalize else state_BLD


def score_mask(tokens: Tokens) -> Tensor:
    """[B, L]: 1 where a token counts in MaxSim."""
    return tokens.get("score_mask", tokens["attention_mask"])
