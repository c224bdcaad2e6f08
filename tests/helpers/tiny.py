"""Tiny data and tokenizers made on the spot, so that tests run the real code without a network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

# Twenty subjects with three facts each: a query asks for one fact, the other two facts are its natural hard negatives.
_SUBJECTS: dict[str, tuple[str, str, str]] = {
    "octopus": ("has three hearts and blue blood", "squeezes through narrow gaps in coral", "hunts crabs at night"),
    "glacier": ("grinds rock into fine grey flour", "flows downhill a few metres each day", "feeds rivers in summer"),
    "violin": ("carries four strings tuned in fifths", "is carved from spruce and maple", "leads the orchestra"),
    "volcano": ("throws ash high above the clouds", "builds new islands from cooled lava", "rumbles before eruptions"),
    "honeybee": ("dances to tell others where flowers are", "stores nectar in wax cells", "guards the hive entrance"),
    "lighthouse": (
        "warns ships of hidden reefs",
        "turns a bright lamp behind a lens",
        "needs fresh paint every spring",
    ),
    "compass": ("points a needle to magnetic north", "guided sailors across open ocean", "fails close to iron"),
    "bread": ("rises because yeast makes gas", "turns brown in a very hot oven", "keeps longer with sourdough"),
    "telescope": ("gathers faint light with a mirror", "showed the moons of Jupiter", "stands on dry mountain peaks"),
    "camel": ("stores fat in its hump", "closes its nostrils in a sandstorm", "drinks many litres at once"),
    "bridge": ("hangs its road from steel cables", "swells on hot days at its joints", "carries trains over the bay"),
    "piano": ("strikes strings with felt hammers", "needs tuning twice a year", "has eighty eight keys"),
    "potato": ("grew first in the Andes of Peru", "sprouts eyes in warm cupboards", "feeds millions with starch"),
    "submarine": ("fills tanks with water to dive", "listens with sonar for other vessels", "hides below polar ice"),
    "owl": ("flies silently on soft feathers", "turns its head almost fully around", "swallows mice whole"),
    "printing press": ("made books cheap in Europe", "pressed inked metal type on paper", "spread the news quickly"),
    "rainbow": ("appears when sunlight bends in drops", "shows red on its outer edge", "forms a circle from planes"),
    "clock": ("counts swings of a pendulum", "lost minutes on rolling ships", "strikes the hour with a bell"),
    "bamboo": ("grows almost a metre in one day", "holds scaffolds in Hong Kong", "flowers once in many decades"),
    "penguin": ("warms an egg upon its feet", "swims with stiff short wings", "huddles against antarctic wind"),
}
_PASSAGE = "The {subject} {fact}. People who study the {subject} wrote about this long ago."
_QUERY = "which thing {fact}"

TokenizerKind = Literal["wordpiece", "bpe", "unigram"]


def tiny_dataset(
    folder: str | Path,
    *,
    passages: int = 60,
    queries: int = 30,
    negatives: int = 7,
    seed: int = 0,
    scores: bool = False,
) -> Path:
    """Write a small canonical dataset of real words and return its folder.

    `corpus.jsonl` (p0, p1, ...; some with a title), `queries.jsonl` (q0, q1, ...; query i asks for passage
    i * 7 mod `passages`), `qrels/{train,dev,test}.tsv` (dev and test: the last fifths) and `train.jsonl` with one
    positive and `negatives` negatives of each training query; with `scores`, a teacher's score of every listed passage.
    """
    folder = Path(folder)
    facts = [(subject, fact) for subject, three in _SUBJECTS.items() for fact in three]
    if passages > len(facts):
        raise ValueError(f"at most {len(facts)} passages")
    rng = random.Random(seed)
    corpus = [
        {"_id": f"p{i}", "title": subject.title() if i % 2 else "", "text": _PASSAGE.format(subject=subject, fact=fact)}
        for i, (subject, fact) in enumerate(facts[:passages])
    ]
    answers = [i * 7 % passages for i in range(queries)]
    asked = [{"_id": f"q{i}", "text": _QUERY.format(fact=facts[row][1])} for i, row in enumerate(answers)]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", asked)

    held_out = max(1, queries // 5)
    splits = {
        "train": range(queries - 2 * held_out),
        "dev": range(queries - 2 * held_out, queries - held_out),
        "test": range(queries - held_out, queries),
    }
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\tp{answers[i]}\t1" for i in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    groups: list[dict[str, Any]] = []
    for i in splits["train"]:
        others = [row for row in range(passages) if row != answers[i]]
        group: dict[str, Any] = {
            "query_id": f"q{i}",
            "positives": [f"p{answers[i]}"],
            "negatives": [f"p{row}" for row in rng.sample(others, negatives)],
        }
        if scores:
            listed = [*group["positives"], *group["negatives"]]
            group["scores"] = {name: round(rng.uniform(-5, 5) + 5 * (k == 0), 3) for k, name in enumerate(listed)}
        groups.append(group)
    write_jsonl(folder / "train.jsonl", groups)
    return folder


def write_jsonl(path: str | Path, records: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line, creating the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def tiny_texts() -> Iterator[str]:
    """Every passage and query of `tiny_dataset`."""
    for subject, facts in _SUBJECTS.items():
        for fact in facts:
            yield _PASSAGE.format(subject=subject, fact=fact)
            yield _QUERY.format(fact=fact)


def tiny_tokenizer(folder: str | Path, kind: TokenizerKind = "wordpiece", *, vocab_size: int = 400) -> Path:
    """Train a tokenizer on `tiny_texts`, save it as a Hugging Face directory and return the folder.

    wordpiece: as BERT's ([CLS] a [SEP] b [SEP], token_type_ids, [MASK]); bpe: as a decoder's (byte level, nothing
    added, an eos token and no pad token); unigram: as XLM-R's (<s> a </s></s> b </s>, no token_type_ids).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "wordpiece":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        added = ["[CLS]", "[SEP]"]
        names = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
    elif kind == "unigram":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
        added = ["<s>", "</s>"]
        names = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "cls_token": "<s>",
        }
        names |= {"sep_token": "</s>", "mask_token": "<mask>"}
        inputs = ["input_ids", "attention_mask"]
    elif kind == "bpe":
        special = ["<|endoftext|>"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        single = pair = ""
        added = []
        names = {"eos_token": "<|endoftext|>"}
        inputs = ["input_ids", "attention_mask"]
    else:
        raise ValueError(f"kind must be wordpiece, bpe or unigram, not {kind!r}")

    tokenizer.train_from_iterator(tiny_texts(), trainer)
    if single:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in added]
        )
    folder = Path(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, model_max_length=512, padding_side="right", **names
    )
    fast.save_pretrained(folder)
    return folder
