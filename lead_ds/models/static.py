"""StaticEmbedding (model2vec): a vector of each token, and of a text their mean. It stands in where a transformer would.

Dimensions: B texts, L tokens, V tokens of the vocabulary, D width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.io.located import find_file
from lead_ds.models.files import family_of, static_folder
from lead_ds.models.library import sentence_transformers

_NAMES = ("embedding.weight", "embeddings")  # sentence-transformers' and model2vec's


class StaticModel(nn.Module):
    """Token vectors in the shape of a transformer of one layer, which does nothing."""

    def __init__(self, config: Any, weights_VD: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        if weights_VD is None:
            weights_VD = torch.randn(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding.from_pretrained(weights_VD, freeze=False)
        self.layers = nn.ModuleList([nn.Identity()])

    @property
    def base_model(self) -> StaticModel:
        """Itself: it has no head."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.embedding.weight.dtype

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """`last_hidden_state` [B, L, D]."""
        return SimpleNamespace(last_hidden_state=self.layers[0](self.embedding(input_ids)))

    def gradient_checkpointing_enable(self, *_: Any) -> None:
        """Raises InputError: there is nothing to compute again."""
        raise InputError(
            "train.gradient_checkpointing", "a StaticEmbedding has no layers to compute again", "set it to false"
        )


def static_shape(path: str) -> Any:
    """The configuration that a transformer of its size would have, from the header of its weights."""
    from safetensors import SafetensorError, safe_open
    from transformers import PretrainedConfig

    folder = static_folder(path) or ""
    file = find_file(path, f"{folder}/model.safetensors".lstrip("/"))
    if file is None:
        raise InputError(path, "its StaticEmbedding has no model.safetensors", "save it with safetensors")
    try:
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            name = next(name for name in _NAMES if name in names)
            rows, width = weights.get_slice(name).get_shape()
            rows = weights.get_slice("mapping").get_shape()[0] if "mapping" in names else rows
    except (SafetensorError, StopIteration, ValueError) as error:
        raise InputError(file, f"holds no token vectors: {error or 'no embedding.weight'}") from error
    shape: Any = PretrainedConfig()
    shape.num_hidden_layers, shape.hidden_size, shape.vocab_size, shape.model_type = 1, width, rows, "static"
    return shape


def static_tokenizer(path: str) -> tuple[Any, Any, int]:
    """Its tokenizer as transformers has one, without special tokens; as it lies there; and how many tokens it cuts a text to."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = find_file(path, f"{static_folder(path) or ''}/tokenizer.json".lstrip("/"))
    if file is None:
        raise InputError(path, "holds no tokenizer.json", "copy the model's")
    try:
        saved, plain = Tokenizer.from_file(str(file)), Tokenizer.from_file(str(file))
    except Exception as error:  # a foreign file can be wrong in any way
        raise InputError(file, f"cannot be read: {str(error).splitlines()[0][:160]}") from error
    longest = int((saved.truncation or {}).get("max_length", 1 << 20))
    plain.post_processor = None
    pad = "[PAD]" if plain.token_to_id("[PAD]") is not None else plain.id_to_token(0)  # read by nobody: its mask is 0
    found = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=pad, model_max_length=longest)
    return found, saved, longest


def static_chain(path: str) -> Any:
    """The modules of a directory that model2vec saved without those of sentence-transformers."""
    library = sentence_transformers()
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from lead_ds.models.files import read_json

    assert family_of(path) is None
    modules: list[nn.Module] = [StaticEmbedding.load(path)]
    if read_json(path, "config.json").get("normalize"):
        modules.append(Normalize())
    return library.SentenceTransformer(modules=modules, device="cpu")
