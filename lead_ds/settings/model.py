"""Settings that every model has: where it is, how its text is read, how its relevance is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lead_ds.settings.base import Place, Positive, Section

# Settings of some kinds of model that another has of its own: given to that one, they would do nothing.
_ELSEWHERE = {
    ("dual_encoder", "token_dim"): "set projection, the width of its vectors",
    ("dual_encoder", "max_length"): "set query_length and passage_length",
    ("colbert", "max_length"): "set query_length and passage_length",
}


class ModelConfig(Section):
    """A retrieval model: where it is, how its text is read and how its relevance is computed."""

    path: Place = Field(description="a Hugging Face directory or hub name, or a sentence-transformers directory")
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: build from config.json alone, for speed and memory measurements"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    pooling: Literal["auto", "cls", "mean", "last"] = Field(
        "auto", description="auto: from modules.json; else cls for encoders, last for decoders"
    )
    normalize: bool | None = Field(None, description="unit-length final vectors; null: from modules.json, else false")
    projection: Positive | None = Field(None, description="width of a new linear layer on top of pooling")
    scale: Literal["none", "cosine", "standard"] = Field(
        "none",
        description="of layer relevance, and of a teacher's final one: as the model gives it, cosines, or z-scores per "
        "query. A student's final relevance is what it will serve: see normalize",
    )
    query_prompt: str | None = Field(None, description="null: from the model's own sentence-transformers configuration")
    passage_prompt: str | None = None
    query_length: Positive = 32
    passage_length: Positive = 128
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: sdpa; on a GPU with flash-attn installed and a 16-bit dtype, the faster of sdpa and "
        "flash_attention_2, measured on the run's first batch",
    )
    passes: Positive | Literal["packed"] | None = Field(
        None,
        description="forwards per micro-batch of the student, per window of the teacher: texts are sorted by length, so that "
        "short ones are not padded to the longest, and queries share a pass with passages. 1 under zero3 gathers the "
        "model once, not twice; 2 to 4 save padding; packed does both: one forward over rows in which texts stand side by "
        "side, none seeing another (decoders, BERT and its kin; checked at start; not colbert). null: one for queries, one "
        "for passages (or one for pairs)",
    )
    query_expansion: bool | None = Field(
        None, description="colbert: pad queries to query_length with mask tokens that count; null: as its files say"
    )
    mask_punctuation: bool | None = Field(
        None, description="colbert: punctuation tokens of a passage never match; null: as its files say"
    )
    token_dim: Positive | None = Field(None, description="colbert: width of a new token projection; null: none")
    allow_pickle: bool = Field(False, description="allow weights that come as pickle (pytorch_model.bin) only")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model: only if you read it")

    @model_validator(mode="after")
    def _of_kind(self) -> ModelConfig:
        for (kind, name), instead in _ELSEWHERE.items():
            field = type(self).model_fields.get(name)
            if getattr(self, "kind", None) == kind and field and getattr(self, name) != field.default:
                raise ValueError(f"{name} is nothing that a {kind} reads: {instead}")
        return self
