"""What `benchmarks.throughput` runs: shapes of real models with random weights, and synthetic texts of known length.

Nothing is downloaded: a preset writes each model's config.json, a tokenizer whose every word is one token, and a collection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 800  # of the synthetic language
# Wider than BERT's own 0.02: untrained layers then tell texts apart, and losses are not all but zero.
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def bert(layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    """A BERT of another size."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**BERT, **sizes, "intermediate_size": 4 * width, **more}


@dataclass(frozen=True)
class Preset:
    """One setting.

    teacher, student: fields of transformers' configuration. settings: lead-ds's, by section, over `COMMON`. lengths: "full":
    every text fills its model's length; "natural": as MS MARCO's (passages 76 tokens on average, queries 9).
    providers: who takes part by default. same_losses: LEAD's own loop is defined for it, so that losses are compared.
    """

    about: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    lengths: str
    providers: tuple[str, ...]
    steps: int = 8
    warmup: int = 3
    same_losses: bool = False


LENGTHS = {"query_length": 32, "passage_length": 128}
COMMON: dict[str, dict[str, Any]] = {
    "teacher": {"kind": "dual_encoder", "weights": "random"},
    "student": {"weights": "random", "pooling": "cls", **LENGTHS},
    "data": {"negatives": 7},
    "losses": {},
    "train": {"batch_size": 32, "save_every": 10**9, "evaluate_every": 0, "log_every": 4},
    "evaluation": {"split": None},
    "monitor": {"tensorboard": False, "csv": False},
}
_EMBEDDER = {**LENGTHS, "pooling": "last", "normalize": True, "scale": "cosine", "dtype": "bf16"}
_COSINE = {"response": {"teacher_temperature": 0.05}, "layer": {"teacher_temperature": 0.05, "select": "last", "k": 5}}
_ALL = ("lead-ds", "bare", "LEAD's loop", "plain loop")
PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        about="small BERT shapes, 6 -> 3 layers 256 wide: LEAD's setting at a size for a CPU",
        teacher=bert(6, 256, 4, vocab_size=1000),
        student=bert(3, 256, 4, vocab_size=1000),
        settings={
            # On a CPU without AMX, bf16 products take twice the time of float32's.
            "teacher": {**LENGTHS, "pooling": "cls", "passes": 4, "dtype": "fp32"},
            "student": {"passes": 4},
            "losses": {"layer": {"k": 3}},
            "train": {"batch_size": 4},
        },
        lengths="natural",
        providers=_ALL,
        steps=4,
        warmup=1,
        same_losses=True,
    ),
    "bert": Preset(
        about="BERT-base -> 6 layers of it: LEAD's own setting",
        teacher=bert(12, 768, 12),
        student=bert(6, 768, 12),
        settings={"teacher": {**LENGTHS, "pooling": "cls", "passes": 4}, "student": {"passes": 4}},
        lengths="natural",
        providers=_ALL,
        steps=12,
        same_losses=True,
    ),
    "7b": Preset(
        about="Mistral-7B's shape -> DistilBERT's",
        teacher=MISTRAL_7B,
        student={"model_type": "distilbert", "vocab_size": 30522, "max_position_embeddings": 512},
        settings={"teacher": _EMBEDDER, "losses": _COSINE},
        lengths="full",
        providers=("lead-ds", "bare", "plain loop"),
    ),
    "8b": Preset(
        about="Qwen3-8B's shape -> 12 layers 384 wide",
        teacher={**QWEN3, "hidden_size": 4096, "intermediate_size": 12288},
        student=bert(12, 384, 12),
        settings={"teacher": _EMBEDDER, "losses": _COSINE},
        lengths="full",
        providers=("lead-ds", "bare", "plain loop"),
    ),
    "reranker": Preset(
        about="a decoder reranker of Qwen3-4B's shape -> DistilBERT's",
        teacher={**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
        student={"model_type": "distilbert", "vocab_size": 30522, "max_position_embeddings": 512},
        settings={
            "teacher": {"kind": "llm_reranker", "template": "plain", "max_length": 256, "dtype": "bf16"},
            "losses": {"layer": {"select": "last", "k": 5, "layer_temperature": 1.0}},
            "train": {"batch_size": 16},
        },
        lengths="full",
        providers=("lead-ds", "bare", "plain loop"),
    ),
}


def configuration(preset: Preset, folder: Path, steps: int) -> dict[str, Any]:
    """lead-ds's configuration of a preset whose files lie in `folder`."""
    tree: dict[str, Any] = {
        section: {**COMMON.get(section, {}), **preset.settings.get(section, {})}
        for section in {**COMMON, **preset.settings}
    }
    tree["teacher"]["path"], tree["student"]["path"] = str(folder / "teacher"), str(folder / "student")
    tree["data"]["path"] = str(folder / "data")
    tree["train"]["steps"] = steps
    tree["output"] = str(folder / "run")
    return tree


def write_model(folder: Path, shape: dict[str, Any], kind: str) -> None:
    """A directory with config.json and a tokenizer, and no weights."""
    from transformers import AutoConfig

    fields = dict(shape)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    if kind == "cross_encoder":
        config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(folder)
    write_tokenizer(folder, decoder=shape["model_type"] in ("mistral", "qwen3"))


def write_tokenizer(folder: Path, *, decoder: bool) -> None:
    """A tokenizer whose every word is one token; [CLS] text [SEP] for encoders, nothing added for decoders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: row for row, word in enumerate([*special, "yes", "no", *(word(i) for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    if not decoder:
        ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0", pair=pair, special_tokens=ends
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    inputs = ["input_ids", "attention_mask"] if decoder else ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, padding_side="right", **names)
    fast.save_pretrained(folder)


def word(i: int) -> str:
    """The i-th word of the synthetic language."""
    return f"w{i}"


def write_data(folder: Path, groups: int, passages: int, query_tokens: int, passage_tokens: int, lengths: str) -> None:
    """A collection in the canonical layout: `groups` queries with `passages` passages each, no text twice."""
    rng = np.random.default_rng(0)

    def texts(count: int, longest: int, mean: float, spread: float) -> Iterator[str]:
        sizes = np.full(count, longest)
        if lengths == "natural":  # two tokens of a text are the tokenizer's own
            drawn = rng.normal(mean, spread, count).clip(4, longest)
            sizes = drawn.round().astype(int) - 2
        for size in sizes:
            yield " ".join(map(word, rng.integers(0, WORDS, size).tolist()))

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for row, text in enumerate(texts(groups * passages, passage_tokens, 76, 26)):
            file.write(json.dumps({"_id": f"p{row}", "title": "", "text": text}) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for row, text in enumerate(texts(groups, query_tokens, 9, 3)):
            file.write(json.dumps({"_id": f"q{row}", "text": text}) + "\n")
    with (folder / "train.jsonl").open("w") as file:
        for row in range(groups):
            names = [f"p{row * passages + i}" for i in range(passages)]
            file.write(json.dumps({"query_id": f"q{row}", "positives": names[:1], "negatives": names[1:]}) + "\n")
