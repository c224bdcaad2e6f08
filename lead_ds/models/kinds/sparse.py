"""A sparse encoder, SPLADE: a text's vector has a weight for every token of the vocabulary, most of them zero.

Dimensions: Q queries, P passages, B texts, L tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError
from lead_ds.models.backbone import checkpoint_activations
from lead_ds.models.chain import replace_modules
from lead_ds.models.files import family_of, read_json
from lead_ds.models.kinds.kind import KINDS, Kind, Use, reading_at_most, two_sided
from lead_ds.models.packing import unpacked
from lead_ds.models.scorer import Output
from lead_ds.models.text import Reading
from lead_ds.relevance import VectorFeatures
from lead_ds.settings.model import TextConfig


class SparseConfig(TextConfig):
    """A sparse encoder: what its files say of its pooling is kept; of a masked language model it is SPLADE's maximum."""

    instead: ClassVar[dict[str, str]] = {
        **TextConfig.instead,
        "token_dim": "take it out: its vectors are as wide as the vocabulary",
        "pooling": "take it out: a sparse encoder pools its logits by the maximum",
    }

    kind: Literal["sparse"] = "sparse"


@KINDS.register("sparse")
class Sparse(Kind):
    """max over tokens of log(1 + relu(logit)), the logits of a masked language model's head; relevance is the dot product.

    Formal et al., SPLADE v2, arXiv 2109.10086. Its layers are not read: the head belongs to the final state.
    """

    name = "sparse"
    scope = "batch"
    Settings = SparseConfig
    family = "SparseEncoder"
    head = "masked"
    gives_vectors = True
    sparse = True
    has_layers = False
    use = Use(
        "sparse encoder",
        "sentence-transformers",
        "feature-extraction",
        ("sentence-transformers", "sparse-encoder", "splade"),
        two_sided("SparseEncoder"),
    )

    def __init__(self, chain: Any, model: Any, config: SparseConfig, *, student: bool = False) -> None:
        super().__init__(chain, model, config, student=student)
        self.vector_width = int(model.config.get_text_config().vocab_size)

    @classmethod
    def claims(cls, path: str) -> int:
        return 3 if family_of(path) == cls.family else 0

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        said = (
            read_json(config.path, "config_sentence_transformers.json") if family_of(config.path) == cls.family else {}
        )
        if said.get("max_active_dims") is not None:
            what = f"keeps {said['max_active_dims']} weights of a text (max_active_dims), which is not done here"
            raise InputError(config.path, what, "save it with max_active_dims: null")
        if said.get("similarity_fn_name") not in (None, "dot"):
            what = (
                f"compares sparse vectors by {said['similarity_fn_name']} (similarity_fn_name), not by the dot product"
            )
            raise InputError(config.path, what, "save it with similarity_fn_name: dot")
        lengths = {name: getattr(config, name) for name in ("query_length", "passage_length")}
        return Reading.of(config, cls.family).encoder(lengths)

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        from sentence_transformers.sparse_encoder.modules import SpladePooling

        if len(chain) == 1:
            width = int(model.config.get_text_config().vocab_size)
            replace_modules(chain, [SpladePooling("max", embedding_dimension=width)])
        if not isinstance(chain[1], SpladePooling):
            raise InputError(config.path, f"its second module is a {type(chain[1]).__name__}, not SpladePooling")

    @classmethod
    def skeleton(cls, config: Any, **how: Any) -> tuple[nn.Module, Any, int]:
        """See `Kind`: with what the logits and their pooling hold, which is more than all layers do."""
        scorer, _, width = super().skeleton(config, **how)
        return scorer, _Counted(scorer), width

    @property
    def features_width(self) -> int:
        return self.vector_width

    @property
    def pooling(self) -> str:
        """How the logits of tokens become one vector: max or sum."""
        return str(self.behind[0].pooling_strategy)

    @property
    def space(self) -> dict[str, Any]:
        return {"pooling": f"splade {self.pooling}", "dimension": self.vector_width}

    def comparable(self, vectors_BD: Tensor) -> Tensor:
        """Final vectors without their zeros, [B, V] sparse: as they are searched, and held for a corpus."""
        return vectors_BD.to_sparse()

    def _answer(self, batch: ModelBatch, layers: Sequence[int], tap_layers: Sequence[int]) -> Output:
        self._refuse_layers([*layers, *tap_layers])
        assert batch.passages is not None
        if batch.passes is not None:
            vectors = self.in_passes(batch.passes, lambda tokens: self._read(tokens, ()))
            count = 0 if batch.queries is None else len(batch.queries["input_ids"])
            queries, passages = vectors[:, :count], vectors[:, count:]
        else:
            passages = self._read(batch.passages, ())
            queries = passages[:, :0] if batch.queries is None else self._read(batch.queries, ())
        return Output(final=VectorFeatures(queries, passages, self.final_scale))

    def all_layers(self, tokens: Tokens) -> Tensor:
        """[1, B, V]: of its final state alone, without dropout."""
        device, training = next(self.parameters()).device, self.training
        said = self.eval()(tokens={name: x.to(device) for name, x in tokens.items()})[None]
        self.train(training)
        return said

    def _refuse_layers(self, layers: Sequence[int]) -> None:
        if layers:
            raise InputError(self.config.path, "a sparse encoder is read at its final state alone", "ask for no layers")

    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """[1, B, V]: of its final state alone. Raises InputError for layers."""
        self._refuse_layers(layers)
        logits_BLV = unpacked(self.model(**self._inputs(tokens)).logits, tokens)
        features = {"token_embeddings": logits_BLV, "attention_mask": tokens["attention_mask"]}
        for module in self.behind:
            features = module(features)
        return features["sentence_embedding"][None]

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        self.chain.prompts |= {"query": encoder.query_prompt, "document": encoder.passage_prompt}
        self.chain.similarity_fn_name = "dot"
        with reading_at_most(encoder.tokenizer, max(encoder.query_length, encoder.passage_length)):
            record = super().save(folder, encoder, state)
        return record | {"query_length": encoder.query_length, "passage_length": encoder.passage_length}

    @classmethod
    def reads(cls, config: Any) -> str:
        return f"Similarity: dot product of sparse vectors. {super().reads(config)}"

    def facts(self, encoder: TextEncoder) -> list[str]:
        return [
            f"pooling: {self.pooling} over tokens of log(1 + relu(logit))",
            f"vector width: {self.vector_width}, the vocabulary",
            f"longest query: {encoder.query_length} tokens; longest passage: {encoder.passage_length}",
        ]


class _Counted(nn.Module):
    """A model with its head and pooling, run as a plan runs a transformer."""

    def __init__(self, scorer: Any) -> None:
        super().__init__()
        self.model, self.behind, self.config = scorer.model, scorer.behind, scorer.model.config

    def forward(self, **inputs: Tensor) -> Any:
        features = {"token_embeddings": self.model(**inputs).logits, "attention_mask": inputs["attention_mask"]}
        for module in self.behind:
            features = module(features)
        return SimpleNamespace(last_hidden_state=features["sentence_embedding"])

    def gradient_checkpointing_enable(self, _: Any) -> None:
        checkpoint_activations(self.model)
