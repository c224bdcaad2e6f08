"""How published rerankers are given a pair, and how their answer is read: by name, or as a model's files say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lead_ds.data.tokens.pair_templates import Conversation, Enclosed, Filled, Joined, PairTemplate, Whole
from lead_ds.data.tokens.tokenizer import leading_tokens, trailing_tokens
from lead_ds.errors import InputError
from lead_ds.models.backbone import Family, has_classifier
from lead_ds.models.chain import open_chain
from lead_ds.models.files import read_json

if TYPE_CHECKING:
    from lead_ds.models.text import Reading

PLAIN = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}\nRelevant (yes or no):"
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_JUDGE = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
_EXPERT = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document pair, "
    "carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 for not "
    "relevant, 1 for relevant).\nRelevance:"
)
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Card:
    """What the authors of a family of rerankers publish of it: its prompt, and the answers whose logits are its score."""

    yes: str
    no: str | None
    template: Callable[
        [Reading, str | None], PairTemplate | None
    ]  # of a model and an instruction; None: the tokenizer's own pairs
    known: str = r"(?!)"  # a pattern of names of its models
    instructed: bool = True
    whole: bool = True  # an answer must be one token; False: the first of several is read
    divisor: float = 1.0
    prompts: tuple[str, str] = ("", "")  # of query and passage, where the tokenizer pairs them
    head: str | None = None  # classifier or seq2seq, where only that is meant


def _plain(reading: Reading, instruction: str | None) -> PairTemplate:
    return Filled(PLAIN, instruction or SEARCH, leading_tokens(reading.tokenizer))


def _qwen3(reading: Reading, instruction: str | None) -> PairTemplate:
    system = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    body = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}"
    return Enclosed(system, body, f"{_ASSISTANT}<think>\n\n</think>\n\n", instruction or SEARCH)


def _bge_gemma(reading: Reading, instruction: str | None) -> PairTemplate:
    begin = reading.tokenizer.bos_token_id
    return Joined("A: {query}", "B: {passage}", tail=(instruction or _JUDGE,), begin=begin, positions=reading.positions)


def _mxbai(reading: Reading, instruction: str | None) -> PairTemplate:
    qwen = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    system = f"<|im_start|>system\n{qwen}<|im_end|>\n<|im_start|>user\n"
    tail = (_EXPERT, _ASSISTANT)
    return Joined("query: {query}", "document: {passage}", system, tail, None, instruction or "", reading.positions)


def _zerank(reading: Reading, instruction: str | None) -> PairTemplate:
    messages = [{"role": "system", "content": "{query}"}, {"role": "user", "content": "{passage}"}]
    if reading.tokenizer.chat_template is None:
        raise InputError(reading.path, "template: zerank is the model's own chat template, and it has none")
    prompt = reading.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Stripped(prompt, leading=leading_tokens(reading.tokenizer))


def _monot5(reading: Reading, instruction: str | None) -> PairTemplate:
    return Whole("Query: {query} Document: {passage} Relevant:")


@dataclass(frozen=True)
class Stripped(Filled):
    """A template whose texts lose what is blank at their edges, and all beyond so many characters."""

    characters: tuple[int, int] = (2_000, 10_000)

    def rows(self, tokenizer: Any, queries: Any, passages: Any, length: int) -> Any:
        most_query, most_passage = self.characters
        asked = [query[:most_query].strip() for query in queries]
        return super().rows(tokenizer, asked, [passage[:most_passage].strip() for passage in passages], length)


CARDS: dict[str, Card] = {
    "plain": Card(" yes", " no", _plain),
    "pair": Card("yes", "no", lambda *_: None, instructed=False),
    "qwen3": Card("yes", "no", _qwen3, r"qwen3-reranker"),
    "bge_gemma": Card("Yes", None, _bge_gemma, r"bge-reranker-v2-gemma", whole=False),
    "mxbai": Card("1", "0", _mxbai, r"mxbai-rerank-(base|large)-v2", whole=False),
    "zerank": Card("Yes", None, _zerank, r"zerank", instructed=False, whole=False, divisor=5.0),
    "rankllama": Card(
        "", None, lambda *_: None, r"rankllama", instructed=False, prompts=("query: ", "document: "), head="classifier"
    ),
    "monot5": Card(
        "true", "false", _monot5, r"monot5|(?<!p)mt5-(3b|13b)-mmarco", instructed=False, whole=False, head="seq2seq"
    ),
    "monomt5": Card(
        "yes", "no", _monot5, r"(?<!p)mt5-base-\S*msmarco|(?<!p)mt5-base-mmarco", instructed=False, head="seq2seq"
    ),
}


@dataclass(frozen=True)
class Asked:
    """How pairs are put to a model, and whose way that is: a card's, or (None) its own files' or configuration's."""

    template: PairTemplate | None
    card: Card | None


def _check_places(template: str) -> None:
    """Raise InputError for a text that has not both places, such as a name that is misspelt."""
    missing = [name for name in ("{query}", "{passage}") if name not in template]
    if missing:
        what = f"{template!r} is no name of a template and lacks {' and '.join(missing)}"
        raise InputError("template", what, f"use one of {', '.join(CARDS)}, or put a place for each into the text")


def asked(config: Any, reading: Reading, family: str, head: Family) -> Asked | None:
    """How pairs are put to a model: by the configuration, else by its files, else by its name; None where none of them says.

    family, head: of its kind. Raises InputError for an instruction that has no place, and for a chat template that no pair
    fits in.
    """
    template, instruction = config.template, config.instruction
    if template is None:
        reader = None if reading.chain is None else reading.chain[0]
        if reader is None:
            template = known_as(reading.path, CARDS)
            chat = str(reading.tokenizer.chat_template or "")
            trained = head == "causal" or (reading.shape is not None and has_classifier(reading.shape))
            if chat and trained and (template is None or ("query" in chat and "document" in chat)):
                reader = open_chain(config, family, head, text=True)[0]
        if reader is not None:
            return _by_files(config, reading, reader)
    if template is None:
        return None
    if template not in CARDS:
        _check_places(template)
        if instruction is not None and "{instruction}" not in template:
            raise InputError("instruction", "has no place in the template", "put {instruction} there, or take it out")
        text = SEARCH if instruction is None else instruction
        after = trailing_tokens(reading.tokenizer) if head == "seq2seq" else ()  # an encoder reads the whole prompt
        return Asked(Filled(template, text, leading_tokens(reading.tokenizer), after), None)
    card = CARDS[template]
    if card.head == "classifier" != head:
        raise InputError("template", f"{template} is a classifier's", "use kind: cross_encoder")
    if (card.head == "seq2seq") != (head == "seq2seq"):
        ways = ", ".join(name for name, card in CARDS.items() if (card.head == "seq2seq") == (head == "seq2seq"))
        raise InputError("template", f"{template} is of another architecture than the model", f"use one of {ways}")
    if instruction is not None and not card.instructed:
        raise InputError("instruction", f"is ignored by template: {template}", "take it out")
    return Asked(card.template(reading, instruction), card)


def known_as(path: str, names: Iterable[str]) -> str | None:
    """The first of `names` of templates whose models a directory's name, or its configuration, says it is one of."""
    return next((name for name in names if _named(path, CARDS[name].known)), None)


def _named(path: str, known: str) -> bool:
    """Whether a directory or repository, or what its configuration says it was, has a name of that pattern."""
    names = (path.rstrip("/").rsplit("/", 1)[-1], str(read_json(path, "config.json").get("_name_or_path", "")))
    return any(re.search(known, name.replace("_", "-"), re.IGNORECASE) for name in names)


def _by_files(config: Any, reading: Reading, reader: Any) -> Asked:
    """As sentence-transformers reads the directory: through its chat template, or as the tokenizer's pairs."""
    if "message" not in reader.modality_config:
        if config.instruction is not None:
            raise InputError(
                "instruction", "is ignored: this model reads a plain pair", "set template, or query_prompt"
            )
        return Asked(None, None)
    prompt = reading.own_query_prompt if config.instruction is None else config.instruction
    template = Conversation(reader, prompt)
    try:
        template.rows(reading.tokenizer, ["a"], ["b"], 1 << 20)
        heard = _rendered(template) != _rendered(Conversation(reader, f"{template.prompt}."))
    except Exception as error:  # a template is a program, and fails in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"its chat template has no place for a query and a passage: {reason[:160]}"
        raise InputError(
            reading.path, what, f"set template: one of {', '.join(CARDS)}, or the prompt itself"
        ) from error
    if config.instruction is not None and not heard:
        raise InputError("instruction", "is ignored by the model's chat template", "take it out")
    return Asked(template, None)


def _rendered(template: Conversation) -> list[list[int]]:
    return template.rows(None, ["a"], ["b"], 1 << 20)[0]
