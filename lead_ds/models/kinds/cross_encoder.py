"""A cross-encoder: its classification head, read on every selected layer.

Dimensions: K selected layers, B pairs, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError
from lead_ds.models.files import family_of, logit_score, read_json, saved_modules
from lead_ds.models.heads import classification_head
from lead_ds.models.kinds.kind import KINDS, Use
from lead_ds.models.kinds.pairs import PairScorer, pooled, pooling
from lead_ds.models.labels import relevance_logit, relevant_label
from lead_ds.models.packing import unpacked
from lead_ds.models.templates import asked
from lead_ds.models.text import Reading
from lead_ds.settings.model import PairConfig


class CrossEncoderConfig(PairConfig):
    """A cross-encoder: which of its labels means relevant."""

    kind: Literal["cross_encoder"] = "cross_encoder"
    relevant_label: int | str | None = Field(
        None, description="the label, or its number, that means relevant; null: as id2label of its files says"
    )


@KINDS.register("cross_encoder")
class CrossEncoder(PairScorer):
    """Scores of query-passage pairs. One label: its logit; of several: the log-odds of the relevant one.

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
        self.relevant = relevant_label(model.config, config.relevant_label, config.path)
        # An unknown family is reported now.
        self._pool = pooling(self.width, classification_head(model, config.path).pooling)

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        if logit_score(config.path) is not None:
            raise InputError(config.path, "a language model scores its pairs (LogitScore)", "use kind: llm_reranker")
        reading = Reading.of(config, cls.family)
        return cls.pair_encoder(config, reading, asked(config, reading, cls.family, cls.head))

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        if family_of(config.path) == cls.family:
            for kind, folder in saved_modules(config.path)[1:]:
                what = f"module {kind} behind its transformer is not supported"
                raise InputError(f"{config.path}/{folder}", what, "a head of transformers' is")

    @classmethod
    def claims(cls, path: str) -> int:
        family = family_of(path)
        if family is not None:
            return 2 if family == cls.family else 0
        names = read_json(path, "config.json").get("architectures") or ()  # read here: the model may come with code
        return 2 if any("ForSequenceClassification" in str(name) for name in names) else 0

    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        head, mask_BL = classification_head(self.model, self.config.path), tokens["attention_mask"]
        means = head.pooling == "mean"
        if head.pooling == "lasttoken":
            mask_BL = self._before_padding(tokens)
        read = self.run(tokens, layers, lambda state: pooled(self._pool, state, mask_BL), through_norm=means)
        logits = head.logits(torch.cat(read))
        scores_KB = relevance_logit(logits, self.relevant).unflatten(0, (len(read), -1))
        return scores_KB if self.lens is None else self.lens(scores_KB, read, layers)

    def scores_of(self, logits: Tensor) -> Tensor:
        return relevance_logit(logits, self.relevant)

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        if getattr(self.config, "relevant_label", None) is not None:  # from now on its files say so
            names = {i: f"irrelevant {i}" for i in range(self.model.config.num_labels)}
            self.model.config.id2label = names | {self.relevant: "relevant"}
            self.model.config.label2id = {name: i for i, name in self.model.config.id2label.items()}
        return super().save(folder, encoder, state)

    def _before_padding(self, tokens: Tokens) -> Tensor:
        """[B, L]: the tokens of which transformers' head of a decoder reads the last: a pad token inside of a text is none."""
        mask_BL, pad = tokens["attention_mask"], self.model.config.get_text_config().pad_token_id
        if pad is None:
            return mask_BL
        ids_BL = unpacked(tokens["input_ids"].unsqueeze(-1), tokens).squeeze(-1)
        return mask_BL * (ids_BL != pad).to(mask_BL.dtype)
