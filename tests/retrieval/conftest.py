"""A tiny collection and a tiny dual encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import tiny_dataset, tiny_tokenizer


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("retrieval") / "data", passages=60, queries=50)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT, as a Hugging Face directory."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tiny_tokenizer(tmp_path_factory.mktemp("models") / "bert", "wordpiece")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder
