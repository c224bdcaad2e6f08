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
_INPUTS = {
    "wordpiece": ["input_ids", "token_type_ids", "attention_mask"],
    "bpe": ["input_ids", "attention_mask"],
    "unigram": ["input_ids", "attention_mask"],
}
_SPECIAL = {
    "wordpiece": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "bpe": {"eos_token": "<|endoftext|>"},
    "unigram": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    },
}


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


def tiny_tokenizer(folder: str | Path, kind: TokenizerKind = "wordpiece") -> Path:
    """Save a tokenizer of 400 tokens of `tiny_texts` as a Hugging Face directory and return the folder.

    wordpiece: as BERT's ([CLS] a [SEP] b [SEP], token_type_ids, [MASK]); bpe: as a decoder's (byte level, nothing
    added, an eos token and no pad token); unigram: as XLM-R's (<s> a </s></s> b </s>, no token_type_ids).

    They were trained once, by tokenizers' trainers, and are kept in `tokenizers/`: training WordPiece or Unigram anew
    gives other tokens in every process, and with them other losses in every test run.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(Path(__file__).parent / "tokenizers" / f"{kind}.json")),
        model_input_names=_INPUTS[kind],
        model_max_length=512,
        padding_side="right",
        **_SPECIAL[kind],
    )
    fast.save_pretrained(folder)
    return Path(folder)
