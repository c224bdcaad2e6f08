"""What `benchmarks.scale` works on: a generated collection, models that take little time, vectors that have neighbours.

Of n passages: n / 10 queries, each with one positive (every tenth passage) and two negatives, as training groups and as
judgements. A query is words of its passage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.io.files import atomic, write_json

GROUP_OF = 10  # passages for each query
WORDS, ASKED = 12, 4  # of a passage, and of a query
VOCABULARY = 5000
BLOCK = 100_000  # passages made at once
WIDTH, CENTRES, LATENT = 128, 4000, 16  # of generated vectors
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RUN = """\
seed: 1
teacher: {{kind: dual_encoder, path: {0}/teacher, dtype: fp32, query_length: 16, passage_length: 32}}
student: {{kind: dual_encoder, path: {0}/student, dtype: fp32, query_length: 16, passage_length: 32}}
data: {{path: {0}, negatives: 2}}
losses:
  layer: {{k: 2}}
train: {{steps: 20, batch_size: 16, log_every: 10, save_every: 10, evaluate_every: 0}}
evaluation: {{split: null}}
monitor: {{tensorboard: false, csv: false}}
kernels: torch
output: {0}/run
pipeline:
  launcher: none
  mine: {{model: {0}/student, number: 4, depth: 20}}
  teach: {{}}
  models: [distilled]
  evaluate:
    - {{split: test, measures: [nDCG@10, R@100]}}
"""


def words() -> list[str]:
    """The vocabulary: distinct, two to nine letters."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    made: dict[str, None] = {}
    while len(made) < VOCABULARY:
        made["".join(rng.choice(letters, rng.integers(2, 10)))] = None
    return list(made)


def collection(folder: Path, passages: int) -> Path:
    """Write corpus, queries, judgements, training groups, models and configuration to `folder`, unless they are there."""
    if (folder / "train.jsonl").exists():
        return folder
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    known = np.array(words(), object)
    # Words are drawn as those of a language are: few of them often.
    odds = 1 / np.arange(10, VOCABULARY + 10)
    odds /= odds.sum()
    rng = np.random.default_rng(1)
    names = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv")
    files = [(folder / name).open("w", encoding="utf-8") for name in names]
    with atomic(folder / "train.jsonl") as temporary, temporary.open("w", encoding="utf-8") as groups:
        for file in files[2:]:
            file.write("query-id\tcorpus-id\tscore\n")
        for start in range(0, passages, BLOCK):
            count = min(BLOCK, passages - start)
            drawn = known[rng.choice(VOCABULARY, (count, WORDS), p=odds)].tolist()
            lines = [f'{{"_id":"p{start + i}","title":"","text":"{" ".join(text)}"}}\n' for i, text in enumerate(drawn)]
            files[0].write("".join(lines))
            others = rng.integers(0, passages, (count, 2)).tolist()
            for i in range(-start % GROUP_OF, count, GROUP_OF):
                query, row = (start + i) // GROUP_OF, start + i
                files[1].write(f'{{"_id":"q{query}","text":"{" ".join(drawn[i][2 : 2 + ASKED])}"}}\n')
                for file in files[2:]:
                    file.write(f"q{query}\tp{row}\t1\n")
                group = {"query_id": f"q{query}", "positives": [f"p{row}"], "negatives": [f"p{n}" for n in others[i]]}
                groups.write(json.dumps(group) + "\n")
        for file in files:
            file.close()
        models(folder)
        (folder / "run.yaml").write_text(RUN.format(folder), "utf-8")
    return folder


def models(folder: Path) -> None:
    """A student and a teacher of random weights, as small as they can be."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    for name, width, layers in (("student", 32, 2), ("teacher", 64, 3)):
        shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        config = BertConfig(**shape, num_attention_heads=2, vocab_size=VOCABULARY + len(SPECIAL))
        BertModel(config).save_pretrained(folder / name)
        tokenizer(folder / name)


def tokenizer(folder: Path) -> None:
    """BERT's layout over the generated words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = {word: i for i, word in enumerate([*SPECIAL, *words()])}
    made = Tokenizer(models.WordPiece(table, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, table[token]) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=128, **named).save_pretrained(folder)


def vectors(folder: Path, count: int, dtype: str = "float32") -> Path:
    """Unit vectors around centres, as `encode` stores them: within a cluster they differ in a few directions of their own.

    Vectors without structure have no neighbours worth finding: no index of them has a recall that says anything.
    """
    from lead_ds.retrieval.small import quantise

    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = 1 << 16
    for shard in range(-(-count // rows)):
        made = drawn(shard, min(rows, count - shard * rows))
        with atomic(folder / f"vectors-{shard:05d}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, quantise(made, dtype) if dtype == "ubinary" else made)
    with (folder / "ids.txt").open("w", encoding="utf-8") as file:
        for start in range(0, count, BLOCK):
            file.write("".join(f"p{i}\n" for i in range(start, min(start + BLOCK, count))))
    made_by = {"checksum": "generated", "similarity": "dot", "dimension": WIDTH}
    facts = {"version": 1, "model": made_by, "kind": "corpus", "prompt": "", "length": 32, "data": "generated"}
    write_json(
        folder / "manifest.json", {**facts, "dtype": dtype, "dimension": WIDTH, "count": count, "shard_rows": rows}
    )
    return folder


def drawn(block: int, count: int) -> np.ndarray:
    """Vectors [count, WIDTH], float32, of a block: equal whenever they are drawn."""
    fixed = np.random.default_rng(2)
    centres = fixed.standard_normal((CENTRES, WIDTH), np.float32)
    directions = fixed.standard_normal((64, LATENT, WIDTH), np.float32) / LATENT**0.5
    rng = np.random.default_rng([3, block])
    own = rng.integers(0, CENTRES, count)
    made = centres[own]
    inner = rng.standard_normal((count, LATENT), np.float32)
    for kind in range(len(directions)):
        some = own % len(directions) == kind
        made[some] += inner[some] @ directions[kind]
    made += 0.1 * rng.standard_normal((count, WIDTH), np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)
