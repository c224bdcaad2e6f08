"""A StaticEmbedding as a dual encoder: the cheapest student there is, and a teacher of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.models.backbone import check_layers
from lead_ds.models.chain import open_chain
from lead_ds.models.files import family_of
from lead_ds.models.library import sentence_transformers
from lead_ds.models.static import StaticModel, static_chain, static_shape, static_tokenizer
from lead_ds.models.text import Reading
from lead_ds.models.vector_encoder import VectorEncoder


class StaticEncoder(VectorEncoder):
    """The mean of token vectors, and what follows it. Its one layer is what its final state is."""

    has_layers = False

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        tokenizer, _, longest = static_tokenizer(config.path)
        reading = Reading.static(config, tokenizer)
        lengths = {name: getattr(config, name) for name in ("query_length", "passage_length")}
        return reading.encoder(lengths, attends=False, longest=longest)

    @classmethod
    def opened(
        cls, config: Any, dtype: torch.dtype, layers: Sequence[int] | None, *, student: bool, frozen: bool
    ) -> Any:
        """A scorer in evaluation mode. Arguments and errors as `Kind.load`."""
        library = sentence_transformers()
        from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

        shape = static_shape(config.path)
        check_layers(layers or [0], 1, config.path)
        if config.pooling not in ("auto", "mean"):
            raise InputError("pooling", f"{config.pooling}: a StaticEmbedding is the mean of its tokens", "take it out")
        if config.weights == "random":
            embedding = StaticEmbedding(static_tokenizer(config.path)[1], embedding_dim=shape.hidden_size)
            chain: Any = library.SentenceTransformer(modules=[embedding], device=str(torch.get_default_device()))
            weights_VD = torch.randn(shape.vocab_size, shape.hidden_size)
        else:
            chain = open_chain(config, cls.family) if family_of(config.path) else static_chain(config.path)
            weights_VD = chain[0].embedding.weight.detach()
        chain.insert(1, Pooling(shape.hidden_size, "mean"))
        cls.complete(chain, StaticModel(shape, torch.empty(1, shape.hidden_size)), config, frozen=frozen)
        for module in list(chain)[1:]:
            module.to(dtype)
        return cls(chain, StaticModel(shape, weights_VD.to(dtype)), config, student=student).eval()

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        whole = self.chain
        embedding = StaticEmbedding(whole[0].tokenizer, state["model.embedding.weight"].float())
        modules: list[nn.Module] = [embedding, *(m for m in self.behind if type(m).__name__ != "Pooling")]
        served = SentenceTransformer(modules=modules, prompts=whole.prompts, device="cpu")
        object.__setattr__(self, "chain", served)
        try:
            return super().save(folder, encoder, state)
        finally:
            object.__setattr__(self, "chain", whole)
