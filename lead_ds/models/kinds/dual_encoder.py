"""A dual encoder: one vector per text, relevance their dot product.

Dimensions: K selected layers, Q queries, P passages, B texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lead_ds.models.dense import Dense
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.models.pooling import PoolingMode, pool
from lead_ds.models.scorer import Output
from lead_ds.relevance import VectorFeatures
from lead_ds.settings.base import Positive
from lead_ds.settings.model import ModelConfig, TextConfig

if TYPE_CHECKING:
    from lead_ds.data.reads import ModelBatch
    from lead_ds.data.tokens.encoder import Tokens


class DualEncoderConfig(TextConfig):
    """A dual encoder: how its token states become one vector."""

    kind: Literal["dual_encoder"] = "dual_encoder"
    pooling: Literal["auto", "cls", "mean", "last"] = Field(
        "auto", description="auto: from modules.json; else cls for encoders, last for decoders"
    )
    normalize: bool | None = Field(None, description="unit-length final vectors; null: from modules.json, else false")
    projection: Positive | None = Field(None, description="width of a new linear layer on top of pooling")


@KINDS.register("dual_encoder")
class DualEncoder(Kind):
    """Pooling, then Dense layers if any, then unit length if `normalize`: of the final state and of every layer alike,
    so that the last layer's vector is the final one."""

    kind = "dual_encoder"
    scope = "batch"
    Settings = DualEncoderConfig
    gives_vectors = True
    lens_form = "vectors"

    def __init__(
        self,
        model: Any,
        config: ModelConfig,
        pooling: PoolingMode,
        dense: Sequence[Dense] = (),
        normalize: bool = False,
    ) -> None:
        super().__init__(model, config)
        self.pooling: PoolingMode = pooling
        self.normalize = normalize
        self.dense = nn.ModuleList(dense)
        # A pooler that comes with the architecture stands beside this pooling and would never see a gradient.
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    @property
    def vector_width(self) -> int:
        """D of the final vectors."""
        last = self.dense[-1] if len(self.dense) else None
        return last.out_features if isinstance(last, Dense) else self.width

    def forward(
        self,
        batch: ModelBatch | None = None,
        layers: Sequence[int] = (),
        tap_layers: Sequence[int] = (),
        *,
        tokens: Tokens | None = None,
    ) -> Any:
        """Output with VectorFeatures of a batch's queries and passages; or the final vectors [B, D] of `tokens`, with
        `layers` those of the layers and then the final ones [K + 1, B, D]."""
        if tokens is not None:
            vectors_KBD = self._vectors(tokens, layers)
            return vectors_KBD if layers else vectors_KBD[-1]
        assert batch is not None
        assert batch.queries is not None
        assert batch.passages is not None
        taps_queries = taps_passages = None
        if batch.passes is not None:
            vectors = self.in_passes(batch.passes, lambda tokens: self._vectors(tokens, layers))
            count = len(batch.queries["input_ids"])
            queries, passages = vectors[:, :count], vectors[:, count:]
        else:
            with self.tapping(tap_layers) as taps_queries:
                queries = self._vectors(batch.queries, layers)
            with self.tapping(tap_layers) as taps_passages:
                passages = self._vectors(batch.passages, layers)
        scale = self.config.scale
        return Output(
            final=VectorFeatures(queries[-1:], passages[-1:], self.final_scale),
            layers=VectorFeatures(queries[:-1], passages[:-1], scale) if layers else None,
            taps_queries=taps_queries,
            taps_passages=taps_passages,
        )

    def embed(self, tokens: Tokens) -> Tensor:
        """Final vectors [B, D] of texts."""
        return self(tokens=tokens)

    def _vectors(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """[K + 1, B, D]: the layers asked for, then the final vector."""
        mask_BL = tokens["attention_mask"]
        read = self.run(
            tokens, layers, lambda state: pool(state, mask_BL, self.pooling), through_norm=self.pooling == "mean"
        )
        vectors_KBD = self._dense(torch.stack(read))
        if self.lens is not None:
            vectors_KBD = self.lens(vectors_KBD, vectors_KBD.unbind(), layers)
        return self._unit(vectors_KBD)

    def read_out(self, vectors: Tensor) -> Tensor:
        """Dense layers, then unit length if `normalize`: pooled states [..., width] -> vectors [..., vector_width]."""
        return self._unit(self._dense(vectors))

    def _dense(self, vectors: Tensor) -> Tensor:
        for dense in self.dense:
            vectors = dense(vectors)
        return vectors

    def _unit(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors
