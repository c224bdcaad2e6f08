"""Encoders of one vector per text: what a dual encoder is, whatever its files hold.

Dimensions: K selected layers, Q queries, P passages, B texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.pair_templates import Message
from lead_ds.data.tokens.tokenizer import end_with_eos
from lead_ds.errors import InputError
from lead_ds.models.backbone import is_decoder
from lead_ds.models.chain import replace_modules
from lead_ds.models.files import family_of, read_json, saved_modules
from lead_ds.models.kinds.kind import Kind, Use, new_layer, reading_at_most, two_sided
from lead_ds.models.scorer import Output
from lead_ds.models.text import Reading
from lead_ds.relevance import VectorFeatures
from lead_ds.settings.base import Positive
from lead_ds.settings.model import ModelConfig, TextConfig

SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}  # our names and sentence-transformers'


class DualEncoderConfig(TextConfig):
    """A dual encoder: how its token states become one vector."""

    instead: ClassVar[dict[str, str]] = {**TextConfig.instead, "token_dim": "set projection, the width of its vectors"}

    kind: Literal["dual_encoder"] = "dual_encoder"
    pooling: Literal["auto", "cls", "mean", "last"] = Field(
        "auto", description="auto: from modules.json; else cls for encoders, last for decoders"
    )
    normalize: bool | None = Field(
        None,
        description="unit-length final vectors, compared by cosine; false: compared by dot product; null: as its files say, "
        "else false",
    )
    projection: Positive | None = Field(None, description="width of a new linear layer on top of pooling")
    dim: Positive | None = Field(
        None,
        description="read it by the first so many dimensions of its vectors, at length 1 where they are; null: all",
    )


class VectorEncoder(Kind):
    """Pooling and what follows it: of the final state and of every layer alike, so that the last layer's vector is the final
    one. Only the pooled state of a layer is kept; what follows runs once, on the layers and the final state together."""

    name = "dual_encoder"
    scope = "batch"
    Settings: ClassVar[type[ModelConfig]] = DualEncoderConfig
    gives_vectors = True
    lens_form = "vectors"
    use = Use(
        "dual encoder",
        "sentence-transformers",
        "sentence-similarity",
        ("sentence-transformers", "feature-extraction", "dense-retrieval"),
        two_sided("SentenceTransformer"),
    )

    def __init__(self, chain: Any, model: Any, config: DualEncoderConfig, *, student: bool = False) -> None:
        super().__init__(chain, model, config, student=student)
        self.freeze_pooler()
        self._lay_out()
        self._truncate: int | None = chain.truncate_dim
        self.similarity = files_similarity(config) or ("cosine" if self.normalize else "dot")
        if self.by_cosine and self.final_scale == "none":
            self.final_scale = "cosine"

    def _lay_out(self) -> None:
        modules: list[Any] = list(self.behind)
        at = 1 + next(i for i, module in enumerate(modules) if type(module).__name__ == "Pooling")
        end = len(modules)
        while end > at and type(modules[end - 1]).__name__ == "Normalize":
            end -= 1
        self._parts = slice(0, at), slice(at, end), slice(end, None)  # up to the pooled state; then; unit length
        # Where pooling only picks a token, the final norm is applied to what was picked.
        self._picks = at == 1 and modules[0].pooling_mode in ("cls", "lasttoken")
        self._sums = "mean" in str(modules[at - 1].pooling_mode)
        self._by_place = "weightedmean" in str(modules[at - 1].pooling_mode)  # a token weighs by its place in the text
        if self.config.passes == "packed" and not modules[at - 1].include_prompt:
            what = "packed rows keep no count of the prompt's tokens, which its pooling leaves out"
            raise InputError("passes", what, "set it to a number, or to null")
        if self.dim is not None:
            self.cut(self.dim)

    def project(self, weight_TD: Tensor) -> None:
        from sentence_transformers.base.modules import Dense

        wide, narrow = weight_TD.shape
        dense = Dense(narrow, wide, bias=False, activation_function=nn.Identity())
        like = next(self.parameters())
        dense.linear.weight.data = weight_TD.to(like)
        modules = list(self.behind)
        modules.insert(self._parts[2].start, dense.to(like.device))
        replace_modules(self.chain, modules)
        self.behind = nn.ModuleList(modules)
        self._lay_out()

    @classmethod
    def claims(cls, path: str) -> int:
        return 2 if family_of(path) == "SentenceTransformer" else 1

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        reading = Reading.of(config, cls.family)
        _refuse_other_vectors(config.path)
        # A decoder that was no retrieval model is taught to say at EOS what a text is about; one that was says how it reads.
        decoder = config.pooling == "auto" and reading.shape is not None and is_decoder(reading.shape)
        if reading.chain is None and (config.pooling == "last" or decoder):
            end_with_eos(reading.tokenizer)
        lengths = {name: getattr(config, name) for name in ("query_length", "passage_length")}
        reader = None if reading.chain is None else reading.chain[0]
        message = Message(reader) if reader is not None and "message" in reader.modality_config else None
        return reading.encoder(lengths, unpooled=None if message else _unpooled(reading), message=message)

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        from sentence_transformers.base.modules import Dense, Normalize
        from sentence_transformers.sentence_transformer.modules import Pooling

        _refuse_other_vectors(config.path)
        width = int(model.config.get_text_config().hidden_size)
        modules = list(chain)[1:]
        mode = _MODES.get(config.pooling)
        at = next((i for i, module in enumerate(modules) if isinstance(module, Pooling)), None)
        if at is None:
            modules.append(Pooling(width, mode or ("lasttoken" if is_decoder(model.config) else "cls")))
        elif mode is not None:
            modules[at] = Pooling(modules[at].embedding_dimension, mode, modules[at].include_prompt)
        if config.projection is not None:
            have = next((module.out_features for module in reversed(modules) if isinstance(module, Dense)), None)
            if new_layer(config, "projection", config.projection, have, frozen=frozen):
                made = Dense(_width(modules, width), config.projection, activation_function=nn.Identity())
                modules.insert(len(modules) - isinstance(modules[-1], Normalize), made)
        if config.normalize is False:
            modules = [module for module in modules if not isinstance(module, Normalize)]
        elif config.normalize and not isinstance(modules[-1], Normalize):
            modules.append(Normalize())
        replace_modules(chain, modules)

    @property
    def pooling(self) -> str:
        """How token states become one: cls, mean, last, or another of sentence-transformers' modes."""
        pool: Any = self.behind[self._parts[0]][-1]
        mode = pool.pooling_mode
        return {theirs: ours for ours, theirs in _MODES.items()}.get(mode, str(mode))

    @property
    def normalize(self) -> bool:
        """Whether its vectors have unit length."""
        return len(self.behind[self._parts[2]]) > 0

    @property
    def unit(self) -> bool:
        return self.normalize and self.truncate is None

    @property
    def by_cosine(self) -> bool:
        return self.similarity == "cosine" and not self.unit

    @property
    def truncate(self) -> int | None:
        """How many dimensions its files have of the finished vector; None: all, or as many as `dim` says."""
        return self._truncate if self.dim is None else None

    @classmethod
    def settled(cls, config: Any) -> Any:
        modules = [kind for kind, _ in saved_modules(config.path)]
        said = read_json(config.path, SENTENCE_TRANSFORMERS).get("truncate_dim")
        if files_similarity(config) != "cosine" or (said is None and "Normalize" in modules[-1:]):
            return config
        # What is learned is what is ranked by: unit vectors, of the dimensions that are kept.
        return config.model_copy(update={"normalize": True, "dim": config.dim or said})

    @property
    def vector_width(self) -> int:
        """D of the final vectors."""
        return self.dim or min(self.truncate or self.width_of_all, self.width_of_all)

    @property
    def width_of_all(self) -> int:
        """D of the vectors before any is cut."""
        return _width(self.behind, self.width)

    def cut(self, dim: int) -> None:
        width = _width(self.behind, self.width)
        if dim > width:
            raise InputError(
                self.config.path, f"dim is {dim}, its vectors have {width} dimensions", f"use at most {width}"
            )
        self.config = self.config.model_copy(update={"dim": dim})

    @property
    def features_width(self) -> int:
        return self.vector_width

    def _answer(self, batch: ModelBatch, layers: Sequence[int], tap_layers: Sequence[int]) -> Output:
        queries, passages, taps_queries, taps_passages = self.of_texts(batch, layers, tap_layers)
        scale = self.config.scale
        return Output(
            final=VectorFeatures(queries[-1:], passages[-1:], self.final_scale),
            layers=VectorFeatures(queries[:-1], passages[:-1], scale) if layers else None,
            taps_queries=taps_queries,
            taps_passages=taps_passages,
        )

    @classmethod
    def reads(cls, config: Any) -> str:
        similarity = "cosine" if config.normalize else "dot product, or as set in config_sentence_transformers.json"
        return f"Similarity: {similarity}. {super().reads(config)}"

    @property
    def space(self) -> dict[str, Any]:
        space = {"pooling": self.pooling, "normalize": self.normalize, "dimension": self.vector_width}
        return space | ({"similarity": "cosine"} if self.by_cosine else {})

    def vectors_of(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        _, then, unit = self._parts
        if not self.behind[self._parts[0]][-1].include_prompt:
            what = "its pooling leaves out the prompt's tokens (include_prompt: false), which a graph of its own cannot count"
            raise InputError(self.config.path, what, "use its directory as it is")
        pooled_BD = self._pool(states_BLD, mask_BL)
        return _through(self.behind[unit], _through(self.behind[then], pooled_BD)[..., : self.dim])[
            ..., : self.truncate
        ]

    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        mask_BL, pooled_BL = tokens["attention_mask"], tokens.get("pool_mask")
        pool = partial(self._pool, mask_BL=mask_BL, pooled_BL=pooled_BL)
        read = self.run(tokens, layers, pool, through_norm=not self._picks)
        _, then, unit = self._parts
        vectors_KBD = _through(self.behind[then], torch.stack(read))
        if self.lens is not None:
            vectors_KBD = self.lens(vectors_KBD, vectors_KBD.unbind(), layers)
        return _through(self.behind[unit], vectors_KBD[..., : self.dim])[..., : self.truncate]

    def _pool(self, states_BLD: Tensor, mask_BL: Tensor, pooled_BL: Tensor | None = None) -> Tensor:
        """[B, D]. pooled_BL: the tokens that count, where those of the prompt do not."""
        if (
            pooled_BL is None or not self._by_place
        ):  # where a mask says all, a GPU need not be asked how long prompts are
            return self._pooled(states_BLD, mask_BL, pooled_BL)
        prompt_B = (mask_BL - pooled_BL).sum(1)
        found_BD: Tensor | None = None
        for count in prompt_B.unique().tolist():  # queries and passages have a prompt each
            some_BD = self._pooled(states_BLD, mask_BL, prompt_length=count)
            found_BD = some_BD if found_BD is None else torch.where((prompt_B == count)[:, None], some_BD, found_BD)
        assert found_BD is not None
        return found_BD

    def _pooled(self, states_BLD: Tensor, mask_BL: Tensor, pooled_BL: Tensor | None = None, **more: Any) -> Tensor:
        features: dict[str, Any] = {"token_embeddings": states_BLD, "attention_mask": mask_BL, **more}
        *before, pool = self.behind[self._parts[0]]
        for module in before:
            features = module(features)
        if pooled_BL is not None:
            features["attention_mask"] = pooled_BL
        if not self._sums or states_BLD.dtype == torch.float32:
            return pool(features)["sentence_embedding"]
        # Sums over tokens of 16 bits, in float32: fp16 overflows, bf16 forgets what is small.
        features["token_embeddings"] = features["token_embeddings"].float()
        return pool(features)["sentence_embedding"].to(states_BLD.dtype)

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        chain = self.chain
        chain.prompts |= {"query": encoder.query_prompt, "document": encoder.passage_prompt}
        chain.similarity_fn_name = self.similarity
        with reading_at_most(encoder.tokenizer, max(encoder.query_length, encoder.passage_length)):
            record = super().save(folder, encoder, state)
        lengths = {"query_length": encoder.query_length, "passage_length": encoder.passage_length}
        trained = {name: getattr(self.config, name, None) for name in ("dims", "quantize")}  # of a student
        return record | lengths | {"normalize": self.normalize} | {name: x for name, x in trained.items() if x}

    def facts(self, encoder: TextEncoder) -> list[str]:
        return [
            f"pooling: {self.pooling}",
            f"vector width: {self.vector_width}",
            f"unit-length vectors: {'yes' if self.normalize else 'no'}",
            f"longest query: {encoder.query_length} tokens; longest passage: {encoder.passage_length}",
        ]


def files_similarity(config: Any) -> str | None:
    """By what a model's files compare its vectors, where they say and no setting does: cosine or dot.

    null is sentence-transformers' cosine. Raises InputError for a distance.
    """
    if config.normalize is not None or family_of(config.path) != "SentenceTransformer":
        return None
    said = str(read_json(config.path, SENTENCE_TRANSFORMERS).get("similarity_fn_name") or "cosine")
    if said not in ("cosine", "dot"):
        what = f"compares vectors by {said} distance (similarity_fn_name), and vectors are ranked by cosine or dot product here"
        raise InputError(config.path, what, "set normalize: true for cosine, or false for the dot product")
    return said


def _unpooled(reading: Reading) -> tuple[int, int] | None:
    """Tokens of the two prompts, as sentence-transformers counts them, where its pooling leaves them out."""
    pool = next((module for module in reading.chain or () if type(module).__name__ == "Pooling"), None)
    if pool is None or pool.include_prompt:
        return None
    special = set(reading.tokenizer.all_special_ids)

    def count(prompt: str) -> int:
        ids = reading.tokenizer(prompt)["input_ids"] if prompt else []
        return len(ids) - (bool(ids) and ids[-1] in special)

    return count(reading.query_prompt), count(reading.passage_prompt)


def _refuse_other_vectors(path: str) -> None:
    if family_of(path) == "MultiVectorEncoder":
        raise InputError(path, "its modules read tokens: this is a late-interaction model", "use kind: colbert")
    if family_of(path) == "SparseEncoder":
        raise InputError(path, "its vectors are sparse, of the vocabulary's width", "use kind: sparse")


def _through(modules: Iterable[nn.Module], vectors: Tensor) -> Tensor:
    """Vectors [..., D] through modules that read `sentence_embedding`."""
    features = {"sentence_embedding": vectors}
    for module in modules:
        features = module(features)
    return features["sentence_embedding"]


def _width(modules: Iterable[Any], width: int) -> int:
    """Of what comes out of modules behind a transformer of `width`."""
    for module in reversed(list(modules)):
        if hasattr(module, "get_embedding_dimension"):
            return int(module.get_embedding_dimension())
    return width
