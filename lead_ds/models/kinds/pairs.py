"""What models of query-passage pairs share: a score of each pair from every selected layer.

Dimensions: K selected layers, Q queries, N passages of each query, B = Q * N pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError
from lead_ds.models.files import RECORD, read_json
from lead_ds.models.kinds.kind import Kind, reading_at_most
from lead_ds.models.scorer import Output
from lead_ds.models.special_weights import quantised_by
from lead_ds.models.templates import Asked
from lead_ds.models.text import Reading
from lead_ds.models.vocabulary import check_finite
from lead_ds.relevance import ScoreFeatures


class PairScorer(Kind):
    """Reads a query and a passage as one text: relevance is defined within a query's own passages."""

    scope = "group"
    family = "CrossEncoder"
    reads_pairs = True
    lens_form = "scores"

    @staticmethod
    def pair_encoder(config: Any, reading: Reading, how: Asked | None) -> TextEncoder:
        """Its reading of pairs, put to it as `how` says; None: as its tokenizer pairs texts."""
        template, card = (None, None) if how is None else (how.template, how.card)
        query, passage = config.query_prompt, config.passage_prompt
        if card is not None:
            query, passage = (
                own if own is not None else said for own, said in zip((query, passage), card.prompts, strict=True)
            )
        elif template is not None:  # which holds the prompt of the model's files, if it has one
            trained = read_json(config.path, RECORD).get("prompts") or {}
            query = query if query is not None else trained.get("query") or ""
            passage = passage if passage is not None else trained.get("document") or ""
        else:
            query, passage = reading.query_prompt, reading.passage_prompt
        reading = replace(reading, query_prompt=query, passage_prompt=passage)
        return reading.encoder({"max_length": config.max_length}, reads_pairs=True, template=template)

    @classmethod
    def of_parts(cls, chain: Any, model: Any, config: Any, *, student: bool) -> Any:
        """See `Kind`. Raises InputError for a model whose own forward gives other scores of a few tokens than are read here.

        A structure does not show what a class does with its logits. A model without weights, and a sharded one, is not asked.
        """
        parameter = next(model.parameters())
        if not _can_be_asked(model, parameter):
            return super().of_parts(chain, model, config, student=student)
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        a, b, c, d = [token for token in range(3, 8) if token != pad][:4]
        ids_BL = torch.tensor([[a, b, c, d], [c, a, pad or 0, pad or 0]], device=parameter.device)
        mask_BL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=parameter.device)
        rows = 2 if pad is not None else 1  # classes of decoders take no padding where their configuration names none
        tokens = {"input_ids": ids_BL[:rows], "attention_mask": mask_BL[:rows]}
        with torch.no_grad():
            said = cls.logits_of(model.eval(), tokens)
            scorer = super().of_parts(chain, model, config, student=student).eval()
            ours_B = scorer(tokens=tokens).float()
            theirs_B = scorer.scores_of(said.float())
        if not theirs_B.isfinite().all():
            check_finite(model, config.path)
            what = f"gives scores that are not finite numbers in {str(parameter.dtype).removeprefix('torch.')}"
            raise InputError(config.path, what, "set dtype to fp32")
        exact = parameter.dtype == torch.float32
        if not torch.allclose(ours_B, theirs_B, rtol=1e-3 if exact else 0.05, atol=1e-3 if exact else 0.3):
            what = f"a {model.config.model_type} computes its scores in another way than is known here"
            raise InputError(config.path, what, "serve it, and set teacher.kind: served")
        return scorer

    @classmethod
    def logits_of(cls, model: Any, tokens: Tokens) -> Tensor:
        """What the whole model gives, of which `scores_of` makes scores: [B, labels]."""
        return model(**tokens).logits

    @abstractmethod
    def scores_of(self, logits: Tensor) -> Tensor:
        """[B]: the scores that the model's own logits mean."""

    @classmethod
    def features_of(cls, config: Any, width: int) -> tuple[int, int]:
        return 0, 1

    @classmethod
    def forwards(cls, config: Any, queries: int, passages: int, length: int | None = None) -> list[tuple[int, int]]:
        return [(passages, length or config.max_length)]

    @classmethod
    def longest(cls, config: Any) -> int:
        return int(config.max_length)

    @classmethod
    def reads(cls, config: Any) -> str:
        return f"Reads a query with a passage, in up to {config.max_length} tokens; longer ones are cut."

    def _answer(self, batch: ModelBatch, layers: Sequence[int], tap_layers: Sequence[int]) -> Output:
        assert batch.pairs is not None
        with self.tapping(tap_layers) as taps:
            if batch.passes is not None:
                scores_KB = self.in_passes(batch.passes, lambda tokens: self._read(tokens, layers))
            else:
                scores_KB = self._read(batch.pairs, layers)
        s_KQN = scores_KB.unflatten(1, (-1, batch.group_size))
        scale = self.config.scale
        return Output(
            final=ScoreFeatures(s_KQN[-1:], self.final_scale),
            layers=ScoreFeatures(s_KQN[:-1], scale) if layers else None,
            taps_queries=None,
            taps_passages=taps,
        )

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        # Scores as they are trained and measured here; sentence-transformers would put a sigmoid on one label.
        self.chain.activation_fn = nn.Identity()
        self.model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        prompts = {"query": encoder.query_prompt, "document": encoder.passage_prompt}
        with reading_at_most(encoder.tokenizer, encoder.max_length):
            record = super().save(folder, encoder, state)
        return record | {"max_length": encoder.max_length, "prompts": prompts}

    def facts(self, encoder: TextEncoder) -> list[str]:
        return [f"longest pair: {encoder.max_length} tokens"]


def _can_be_asked(model: Any, parameter: Tensor) -> bool:
    """Whether a model can be run as it is loaded: whole, and with kernels that its device has."""
    whole = not (parameter.is_meta or hasattr(parameter, "ds_id") or quantised_by(model.config))
    halves = parameter.dtype == torch.float16 or "flash" in str(model.config._attn_implementation)
    return whole and not (halves and parameter.device.type == "cpu")


def pooling(width: int, mode: str) -> nn.Module:
    """sentence-transformers' pooling, for a head that reads one state."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(width, mode)  # type: ignore[arg-type]


def pooled(pool: nn.Module, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """[B, L, D] token states -> [B, D]."""
    return pool({"token_embeddings": states_BLD, "attention_mask": mask_BL})["sentence_embedding"]
