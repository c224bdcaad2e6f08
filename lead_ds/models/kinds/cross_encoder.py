"""A cross-encoder: its classification head, read on every selected layer.

Dimensions: K selected layers, B pairs, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lead_ds.models.backbone import has_classifier, read_model_config
from lead_ds.models.files import family_of
from lead_ds.models.heads import check_labels, classification_head, relevance_logit
from lead_ds.models.kinds.kind import KINDS, Use
from lead_ds.models.kinds.pairs import PairScorer, pooled, pooling
from lead_ds.settings.model import PairConfig

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

    name = "cross_encoder"
    Settings = CrossEncoderConfig
    head = "classifier"
    use = Use(
        "cross-encoder",
        "sentence-transformers",
        "text-ranking",
        ("sentence-transformers", "cross-encoder", "reranker"),
        """from sentence_transformers import CrossEncoder
model = CrossEncoder("this directory")
query, passage = "what is late interaction?", "ColBERT compares every query token with every passage token."
print(model.predict([(query, passage)]))  # a logit: no sigmoid""",
    )

    def __init__(self, chain: Any, model: Any, config: CrossEncoderConfig, *, student: bool = False) -> None:
        super().__init__(chain, model, config, student=student)
        check_labels(model.config.num_labels, config.path)
        # An unknown family is reported now.
        self._pool = pooling(self.width, classification_head(model, config.path).pooling)

    @classmethod
    def claims(cls, path: str) -> int:
        family = family_of(path)
        if family is not None:
            return 2 if family == cls.family else 0
        return 2 if has_classifier(read_model_config(CrossEncoderConfig(path=path))) else 0

    def _scores(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        head, mask_BL = classification_head(self.model, self.config.path), tokens["attention_mask"]
        means = head.pooling == "mean"
        read = self.run(tokens, layers, lambda state: pooled(self._pool, state, mask_BL), through_norm=means)
        logits = head.logits(torch.cat(read))
        scores_KB = relevance_logit(logits).unflatten(0, (len(read), -1))
        return scores_KB if self.lens is None else self.lens(scores_KB, read, layers)
