"""A tiny collection and tiny models of several architectures, saved as anyone's would be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.helpers.tiny import tiny_dataset, tiny_tokenizer


def save_bert(
    folder: Path, *, layers: int, width: int, head: bool = False, seed: int = 0, dropout: float = 0.0
) -> Path:
    """A random BERT with a WordPiece tokenizer; with `head`, a cross-encoder of one logit."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=400,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=128,
        num_labels=1,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model: Any = BertForSequenceClassification(config) if head else BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    tiny_tokenizer(folder, "wordpiece")
    return folder


def save_llama(folder: Path, *, layers: int, width: int, causal: bool = False) -> Path:
    """A random Llama with a byte-level BPE tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config) if causal else LlamaModel(config)
    model.save_pretrained(folder)
    tiny_tokenizer(folder, "bpe")
    return folder


def make_rooms(root: Path) -> Path:
    """A folder with `data`, and the models `student`, `dropout`, `bert`, `llama`, `cross`, `reranker`."""
    tiny_dataset(root / "data", passages=60, queries=50, negatives=7)
    save_bert(root / "student", layers=3, width=16, seed=1)
    save_bert(root / "dropout", layers=3, width=16, seed=1, dropout=0.1)
    save_bert(root / "bert", layers=6, width=32, seed=2)
    for file in (root / "student").glob("tokenizer*"):  # attention maps are compared token by token
        shutil.copy(file, root / "bert")
    save_bert(root / "cross", layers=4, width=32, head=True, seed=3)
    save_llama(root / "llama", layers=5, width=32)
    save_llama(root / "reranker", layers=3, width=32, causal=True)
    return root


TEACHERS = {
    "dual_encoder": {"kind": "dual_encoder", "path": "llama", "scale": "cosine"},
    "colbert": {"kind": "colbert", "path": "bert", "scale": "cosine"},
    "cross_encoder": {"kind": "cross_encoder", "path": "cross", "max_length": 64},
    "llm_reranker": {
        "kind": "llm_reranker",
        "path": "reranker",
        "max_length": 128,
        "template": "{query} {passage}",
        "yes_token": "e",
        "no_token": "o",
    },
}


def settings(
    rooms: Path,
    output: Path,
    teacher: str = "dual_encoder",
    extra_teacher: dict[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """A configuration of a short run in float32; `sections` are merged into it."""
    lengths = {} if "max_length" in TEACHERS[teacher] else {"query_length": 32, "passage_length": 48}
    tree: dict[str, Any] = {
        "seed": 3,
        "teacher": {**TEACHERS[teacher], "dtype": "fp32", **lengths, **(extra_teacher or {})},
        "student": {"path": "student", "normalize": True, "query_length": 32, "passage_length": 48},
        "data": {"path": str(rooms / "data"), "negatives": 2},
        "losses": {"layer": {"k": 2, "every": 2, "layer_temperature": 1.0}},
        "train": {"steps": 6, "batch_size": 4, "lr": 1e-3, "log_every": 1, "save_every": 2, "evaluate_every": 0},
        "evaluation": {"split": None},
        "monitor": {"tensorboard": False, "csv": False},
        "kernels": "torch",
        "output": str(output),
    }
    for name, section in sections.items():
        tree[name] = (
            {**tree[name], **section} if isinstance(section, dict) and isinstance(tree.get(name), dict) else section
        )
    ignored = {"cross_encoder": ("normalize", "query_length", "passage_length"), "sparse": ("normalize",)}
    others = ignored.get(tree["student"].get("kind"), ())
    tree["student"] = {name: x for name, x in tree["student"].items() if name not in others}
    if tree["teacher"].get("train"):  # in the student's engine, in its dtype
        tree["teacher"]["dtype"] = tree["student"].get("dtype", "auto")
    for model in ("teacher", "student"):
        if not Path(tree[model]["path"]).is_absolute():
            tree[model]["path"] = str(rooms / tree[model]["path"])
    return tree
