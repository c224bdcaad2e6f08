"""Late interaction: a vector per token, relevance their MaxSim.

Dimensions: K selected layers, Q queries, P passages, B texts, L tokens, D width.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import Expansion, TextEncoder, Tokens, score_mask
from lead_ds.data.tokens.tokenizer import keep_markers_whole
from lead_ds.errors import InputError
from lead_ds.models.chain import replace_modules
from lead_ds.models.files import RECORD, family_of, read_json, saved_modules
from lead_ds.models.kinds.kind import KINDS, Kind, Use, new_layer, two_sided
from lead_ds.models.scorer import Output
from lead_ds.models.text import Reading
from lead_ds.relevance import Scale, TokenFeatures
from lead_ds.settings.base import Positive
from lead_ds.settings.model import TextConfig

_TOKENS = "token_embeddings"
_EXPANDED = 32  # tokens that a query is filled up to where neither a setting nor the files say: ColBERT's own number


class ColBERTConfig(TextConfig):
    """A late-interaction model: what its token states become, and which of them count."""

    instead: ClassVar[dict[str, str]] = {
        **TextConfig.instead,
        "projection": "set token_dim, the width of its tokens' vectors",
    }

    kind: Literal["colbert"] = "colbert"
    normalize: bool | None = Field(
        None, description="unit-length token vectors; null: as its files have it, else false"
    )
    query_expansion: bool | None = Field(
        None,
        description="pad queries with mask tokens that count, to query_length (32 where neither it nor the files say); null: as "
        "its files have it",
    )
    mask_punctuation: bool | None = Field(
        None, description="punctuation tokens of a passage never match; null: as its files have it"
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
    """Token states, then what follows the transformer (Dense, unit length): of the final state and of every layer alike.

    Which tokens count is the tokens' `score_mask` (query expansion, punctuation), else their `attention_mask`.
    """

    name = "colbert"
    scope = "batch"
    Settings = ColBERTConfig
    family = "MultiVectorEncoder"
    use = Use(
        "ColBERT (late interaction)",
        "sentence-transformers",
        "text-ranking",
        ("sentence-transformers", "ColBERT", "late-interaction", "reranker"),
        two_sided("MultiVectorEncoder"),
    )

    def __init__(self, chain: Any, model: Any, config: ColBERTConfig, *, student: bool = False) -> None:
        super().__init__(chain, model, config, student=student)
        self.freeze_pooler()
        # Which tokens count is said by the tokens themselves: see `read_text`.
        self._reading = [i for i, module in enumerate(self.behind) if type(module).__name__ != "MultiVectorMask"]

    @classmethod
    def claims(cls, path: str) -> int:
        architectures = read_json(path, "config.json").get("architectures") or ()
        named = any("ColBERT" in str(name) for name in architectures)
        return 2 if named or family_of(path) == cls.family else 0

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        reading = Reading.of(config, cls.family)
        tokenizer = reading.tokenizer
        keep_markers_whole(tokenizer, [reading.query_prompt, reading.passage_prompt])
        lengths = {"query_length": config.query_length, "passage_length": config.passage_length}
        saved = reading.chain[0] if reading.chain is not None else None
        given = {name for name in lengths if lengths[name] is not None}
        if saved is not None:
            own = {"query_length": saved.query_length, "passage_length": saved.document_length}
            lengths |= {name: length for name, length in own.items() if length and name not in given}
        expansion = None if saved is None else saved.query_expansion
        wide = None
        if config.query_expansion or (config.query_expansion is None and expansion is not None):
            length = lengths["query_length"] or _EXPANDED
            how = expansion or {"strategy": "fixed", "attend": False, "token": None, "length": length}
            length = length if "query_length" in given else how["length"]
            wide = Expansion(length, _expansion_token(tokenizer, how["token"], config.path), how["attend"])
            if how["strategy"] == "fixed":
                lengths["query_length"] = length
            else:
                lengths["query_length"] = max(length, lengths["query_length"] or reading.length("query_length"))
        words, tasks = _skipped(reading.chain, config)
        return reading.encoder(
            lengths,
            scores_tokens=True,
            expansion=wide,
            skip_tokens=_ids(tokenizer, words) if "document" in tasks else frozenset(),
            skip_in_queries="query" in tasks,
        )

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        from sentence_transformers.base.modules import Dense, Normalize
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        modules = list(chain)[1:]
        if not any(kind == "Dense" for kind, _ in saved_modules(config.path)) and modules:
            stanford = not saved_modules(config.path)  # whose projection lies among the transformer's weights
            modules = [m for m in modules if not isinstance(m, Dense) or stanford]
        if config.token_dim is not None:
            have = next((module.out_features for module in reversed(modules) if isinstance(module, Dense)), None)
            if new_layer(config, "token_dim", config.token_dim, have, frozen=frozen):
                width = int(model.config.get_text_config().hidden_size)
                made = Dense(
                    width, config.token_dim, bias=False, activation_function=nn.Identity(), module_input_name=_TOKENS
                )
                modules.insert(0, made)
        words, tasks = _skipped(chain if modules else None, config)
        mask = MultiVectorMask(words, skiplist_tasks=tasks)
        modules = [mask if isinstance(module, MultiVectorMask) else module for module in modules]
        if mask not in modules:
            modules.append(mask)
        unit = any(isinstance(module, Normalize) for module in modules)
        unit = bool(read_json(config.path, RECORD).get("normalize", unit))
        unit = unit if config.normalize is None else config.normalize
        modules = [module for module in modules if not isinstance(module, Normalize)]
        replace_modules(chain, [*modules, Normalize(_TOKENS)] if unit else modules)

    @property
    def normalize(self) -> bool:
        """Whether its token vectors have unit length."""
        return any(type(module).__name__ == "Normalize" for module in self.behind)

    @property
    def features_width(self) -> int:
        modules: list[Any] = list(self.behind)
        return next((int(m.out_features) for m in reversed(modules) if hasattr(m, "out_features")), self.width)

    @classmethod
    def features_of(cls, config: Any, width: int) -> tuple[int, int]:
        return width * config.query_length, width * config.passage_length

    @classmethod
    def reads(cls, config: Any) -> str:
        return f"Similarity: MaxSim of token vectors. {super().reads(config)}"

    def _answer(self, batch: ModelBatch, layers: Sequence[int], tap_layers: Sequence[int]) -> Output:
        assert batch.queries is not None
        assert batch.passages is not None
        q_mask, p_mask = score_mask(batch.queries), score_mask(batch.passages)
        queries, passages, taps_queries, taps_passages = self.of_texts(batch, layers, tap_layers)
        queries, passages = queries[:, :, : q_mask.shape[1]], passages[:, :, : p_mask.shape[1]]  # passes pad them alike

        def features(part: slice, scale: Scale) -> TokenFeatures:
            return TokenFeatures(queries[part], q_mask, passages[part], p_mask, scale)

        return Output(
            final=features(slice(-1, None), self.final_scale),
            layers=features(slice(0, -1), self.config.scale) if layers else None,
            taps_queries=taps_queries,
            taps_passages=taps_passages,
        )

    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        mask_BL = tokens["attention_mask"]

        def read_out(state_BLD: Tensor) -> Tensor:
            features = {_TOKENS: state_BLD, "attention_mask": mask_BL}
            for i in self._reading:
                features = self.behind[i](features)
            return features[_TOKENS]

        return torch.stack(self.run(tokens, layers, read_out, through_norm=True))

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        transformer, wide = self.chain[0], encoder.expansion
        self.chain.prompts |= {"query": encoder.query_prompt, "document": encoder.passage_prompt}
        self.chain.similarity_fn_name = "maxsim"
        transformer.query_expansion = None
        transformer.query_length, transformer.document_length = encoder.query_length, encoder.passage_length
        transformer.processor = encoder.tokenizer
        if wide is not None:
            strategy = "fixed" if wide.length == encoder.query_length else "min"
            token = encoder.tokenizer.convert_ids_to_tokens(wide.token)
            transformer.query_expansion = {
                "strategy": strategy,
                "attend": wide.attended,
                "length": wide.length,
                "token": token,
            }
        lengths = {"query_length": encoder.query_length, "passage_length": encoder.passage_length}
        return super().save(folder, encoder, state) | lengths | {"normalize": self.normalize}

    def facts(self, encoder: TextEncoder) -> list[str]:
        return [
            f"token vector width: {self.features_width}",
            f"unit-length vectors: {'yes' if self.normalize else 'no'}",
            f"longest query: {encoder.query_length} tokens; longest passage: {encoder.passage_length}",
        ]


def _skipped(chain: Any, config: Any) -> tuple[list[str], list[str]]:
    """The tokens that never count, and in which texts: in queries, documents."""
    mask = next((m for m in chain or () if type(m).__name__ == "MultiVectorMask"), None)
    words, tasks = (mask.skiplist_words, mask.skiplist_tasks) if mask is not None else ([], ["document"])
    if mask is not None and mask.keep_only_token_ids:
        raise InputError(config.path, "counts tokens of images only, which is not supported")
    if config.mask_punctuation is not None:
        words = list(string.punctuation) if config.mask_punctuation else []
    return words, tasks


def _ids(tokenizer: Any, words: Sequence[str]) -> frozenset[int]:
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in words}
    known = {word: i for word, i in ids.items() if i is not None}
    return frozenset(i for word, i in known.items() if i != tokenizer.unk_token_id or word == tokenizer.unk_token)


def _expansion_token(tokenizer: Any, token: str | None, path: str) -> int:
    """By sentence-transformers' rule: the token named, else the mask token, else EOS."""
    own = tokenizer.convert_tokens_to_ids(token) if token is not None else tokenizer.mask_token_id
    if own is None:
        own = tokenizer.eos_token_id
    if own is None:
        raise InputError(path, "its tokenizer has no mask token", "set query_expansion: false")
    return int(own)
