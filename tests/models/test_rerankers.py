"""Rerankers as their cards' code and sentence-transformers read them: prompt, answer, label and what of a long text is cut."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lead_ds.config import TeacherConfig
from lead_ds.errors import InputError
from lead_ds.models.load import kind_of, load_scorer, load_teacher, load_text
from tests.models.tiny_models import tiny_model

LONG = "bread rises because yeast makes gas and keeps longer with sourdough " * 5
PAIRS = [
    ("which thing has three hearts", "The octopus has three hearts.\nIt hunts crabs."),
    (" blank edges ", "a text with a blank behind "),
    ("what is Zürich?", "東京 is no town of it"),
    ("owl", LONG),
    (LONG, LONG),
    (LONG, "owl"),
]
QUERIES, PASSAGES = ([pair[i] for pair in PAIRS] for i in (0, 1))
CHAT = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3-Reranker's repository has it since sentence-transformers reads it.
JUDGE = (
    "<|im_start|>system\nJudge the Document.<|im_end|>\n<|im_start|>user\n<Instruct>: "
    "{{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | default('Search.') }}\n<Query>: "
    "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n<Document>: "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def made(folder: Path, head: str = "causal", chat: str | None = None, **shape: Any) -> str:
    """A decoder whose tokenizer knows the marks and answers of published rerankers."""
    path = tiny_model(folder, "qwen3", head, layers=2, max_position_embeddings=4096, **shape)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<bos>"]})
    tokenizer.add_tokens(["yes", "no", "Yes"])
    tokenizer.bos_token, tokenizer.pad_token, tokenizer.model_max_length = "<bos>", "<|endoftext|>", 4096
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(path)
    auto = {"causal": transformers.AutoModelForCausalLM, "classifier": transformers.AutoModelForSequenceClassification}
    model = auto[head].from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(5))
        if head == "causal":
            model.get_output_embeddings().weight.normal_(generator=torch.Generator().manual_seed(6))
    model.save_pretrained(path)
    return path


def ours(path: str, kind: str = "llm_reranker", **settings: Any) -> Tensor:
    config = TeacherConfig(kind=kind, path=path, **settings)
    encoder = pickle.loads(pickle.dumps(load_text(config)))
    with torch.no_grad():
        return load_teacher(config, torch.float32)(tokens=encoder.pairs(QUERIES, PASSAGES))


def logits(path: str, rows: list[list[int]]) -> Tensor:
    """[B, V]: of the last token, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])


def qwen3_card(path: str, length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    head, tail = (tokenizer.encode(text, add_special_tokens=False) for text in (prefix, suffix))
    task = "Given a web search query, retrieve relevant passages that answer the query"
    texts = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {passage}" for query, passage in PAIRS]
    room = length - len(head) - len(tail)
    bodies = tokenizer(texts, padding=False, truncation="longest_first", max_length=room)["input_ids"]
    said = logits(path, [head + body + tail for body in bodies])
    return said[:, tokenizer.convert_tokens_to_ids("yes")] - said[:, tokenizer.convert_tokens_to_ids("no")]


def only_second(first: list[int], second: list[int], length: int) -> list[int]:
    """`prepare_for_model(truncation="only_second")` of transformers 4."""
    excess = len(first) + len(second) - length
    return first + (second[: len(second) - excess] if 0 < excess < len(second) else second)


def bge_gemma_card(path: str, length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def ids(text: str, **cut: Any) -> list[int]:
        return tokenizer(text, add_special_tokens=False, **cut)["input_ids"]

    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    rows = []
    for query, passage in PAIRS:
        first = ids(f"A: {query}", max_length=length * 3 // 4, truncation=True)
        second = ids(f"B: {passage}", max_length=length, truncation=True)
        body = only_second([tokenizer.bos_token_id, *first], ids("\n") + second, length)
        rows.append(body + ids("\n") + ids(prompt))
    return logits(path, rows)[:, ids("Yes")[0]]


def mxbai_card(path: str, length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")

    def ids(text: str, **cut: Any) -> list[int]:
        return tokenizer(text, add_special_tokens=False, **cut)["input_ids"]

    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
        "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 for "
        "not relevant, 1 for relevant).\nRelevance:"
    )
    system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    prefix = ids(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    suffix = ids("<|im_end|>\n<|im_start|>assistant\n")
    rows = []
    for query, passage in PAIRS:
        first = ids(f"query: {query}", max_length=length * 3 // 4, truncation=True)
        second = ids(f"document: {passage}", max_length=length, truncation=True)
        rows.append(prefix + only_second(first, ids("\n") + second, length) + ids("\n") + ids(task) + suffix)
    said = logits(path, rows)
    return said[:, ids("1")[0]] - said[:, ids("0")[0]]


def zerank_card(path: str, length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="right")
    rows = []
    for query, passage in PAIRS:
        said = [("system", query[:2_000].strip()), ("user", passage[:10_000].strip())]
        messages = [{"role": role, "content": text} for role, text in said]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(text)["input_ids"])
    return logits(path, rows)[:, tokenizer.encode("Yes", add_special_tokens=False)[0]] / 5.0


CARDS: dict[str, tuple[Callable[[str, int], Tensor], str, tuple[int, ...]]] = {
    "qwen3": (qwen3_card, "Qwen3-Reranker-0.6B", (4096, 280)),
    "bge_gemma": (bge_gemma_card, "bge-reranker-v2-gemma", (4096, 60)),
    "mxbai": (mxbai_card, "mxbai-rerank-large-v2", (3000, 60)),
    "zerank": (zerank_card, "zerank-1-small", (4096,)),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_published_reranker_scores_as_its_cards_code(tmp_path: Path, name: str) -> None:
    card, repository, lengths = CARDS[name]
    path = made(tmp_path / repository, chat=CHAT if name == "zerank" else None)
    for length in lengths:
        expected = card(path, length)
        assert expected.std() > 0.01
        for settings in ({"template": name}, {}):  # chosen, and recognised by its name
            torch.testing.assert_close(ours(path, max_length=length, **settings), expected, rtol=2e-5, atol=2e-5)


def test_rankllama_is_a_classifier_of_prefixed_pairs(tmp_path: Path) -> None:
    path = made(tmp_path, "classifier")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = []
    with torch.no_grad():
        for query, passage in PAIRS:
            inputs = tokenizer(f"query: {query}", f"document: {passage}", return_tensors="pt")
            expected.append(model(**inputs).logits[0][0])
    scores = ours(path, "cross_encoder", template="rankllama", max_length=4096)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=2e-5, atol=2e-5)
    with pytest.raises(InputError, match="rankllama is a classifier's"):
        ours(path, template="rankllama")


def reference(path: str, length: int | None = None) -> Tensor:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(path, device="cpu")
    if length is not None:
        model[0].tokenizer.model_max_length = length
    return model.predict(PAIRS, batch_size=1, activation_fn=torch.nn.Identity(), convert_to_tensor=True).clone()


def scored(path: str, *, false: str | None, chat: bool) -> str:
    """Save what made() made as sentence-transformers saves a language model that scores pairs; returns the folder."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    text = {"text": {"method": "forward", "method_output_name": "logits"}}
    plain: dict[str, Any] = {} if chat else {"modality_config": text, "module_output_name": "causal_logits"}
    reader = Transformer(path, transformer_task="text-generation", **plain)
    yes, no = (reader.tokenizer.convert_tokens_to_ids(answer) if answer else None for answer in ("yes", false))
    model = CrossEncoder(
        modules=[reader, LogitScore(yes, no)], prompts={"query": "Find it."}, default_prompt_name="query"
    )
    model.save_pretrained(f"{path}-saved", create_model_card=False)
    return f"{path}-saved"


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("false", ["no", None])
def test_a_saved_logit_score_is_read_as_sentence_transformers_reads_it(
    tmp_path: Path, false: str | None, chat: bool
) -> None:
    path = scored(made(tmp_path / "m", chat=JUDGE), false=false, chat=chat)
    assert kind_of(path) == "llm_reranker"
    for length in (4096, 90):
        torch.testing.assert_close(ours(path, max_length=length), reference(path, length), rtol=2e-5, atol=2e-5)
    if chat:
        moved = ours(path, max_length=4096, instruction="Another task.") - reference(path)
        assert moved.abs().max() > 1e-3
    else:
        with pytest.raises(InputError, match="instruction: is ignored"):
            ours(path, instruction="Another task.")
    with pytest.raises(InputError, match="use kind: llm_reranker"):
        ours(path, "cross_encoder")


def test_a_classifier_with_a_chat_template(tmp_path: Path) -> None:
    path = made(tmp_path / "m", "classifier", JUDGE)
    for length in (4096, 90):
        scores = ours(path, "cross_encoder", max_length=length)
        torch.testing.assert_close(scores, reference(path, length), rtol=2e-5, atol=2e-5)
    plain = ours(path, "cross_encoder", template="pair", max_length=4096)
    filled = ours(path, "cross_encoder", template="a: {query} b: {passage} end", max_length=4096)
    assert (plain - scores).abs().max() > 1e-3
    assert (filled - plain).abs().max() > 1e-3


def test_a_chat_template_without_places_is_refused(tmp_path: Path) -> None:
    chat = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    path = made(tmp_path / "m", "classifier", chat)
    with pytest.raises(InputError, match=r"has no place for a query and a passage.*set template"):
        ours(path, "cross_encoder")
    with pytest.raises(InputError, match="no file of it says how a decoder reranker is asked"):
        ours(made(tmp_path / "n"))


def test_yes_alone_where_no_token_is_null(tmp_path: Path) -> None:
    path = made(tmp_path)
    settings = {"template": "{query} {passage}", "yes_token": "yes"}
    both, yes, no = (
        ours(path, **settings | more)
        for more in ({"no_token": "no"}, {"no_token": None}, {"yes_token": "no", "no_token": None})
    )
    torch.testing.assert_close(both, yes - no, rtol=1e-5, atol=1e-5)
    assert (
        load_scorer(path, "llm_reranker", ["template={query} {passage}", "yes_token=yes", "no_token=null"])[
            0
        ].rows_AD.shape[0]
        == 1
    )


LABELS: list[tuple[list[str], int | None]] = [
    (["relevant", "irrelevant"], 0),
    (["NOT_RELEVANT", "something"], 1),
    (["entailment", "neutral", "contradiction"], 0),
    (["contradiction", "entailment", "neutral"], 1),
    (["LABEL_0", "LABEL_1"], 1),
    (["no", "yes"], 1),
    (["0", "1"], 1),
    (["red", "green"], None),
    (["relevant", "highly relevant", "irrelevant"], None),
    (["irrelevant"], None),
]


@pytest.mark.parametrize(("names", "relevant"), LABELS)
def test_the_relevant_label_is_the_one_that_is_named(tmp_path: Path, names: list[str], relevant: int | None) -> None:
    path = tiny_model(tmp_path, "bert", "classifier", labels=len(names), layers=1)
    tree = json.loads((tmp_path / "config.json").read_text()) | {"id2label": dict(enumerate(names))}
    tree["label2id"] = {name: i for i, name in enumerate(names)}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    config = TeacherConfig(kind="cross_encoder", path=path, max_length=100)
    if relevant is None:
        with pytest.raises(InputError, match=r"not clear.*set relevant_label"):
            load_teacher(config, torch.float32)
        config = config.model_copy(update={"relevant_label": names[-1]})
        relevant = len(names) - 1
    tokens = load_text(config).pairs(["owl", "which"], ["an owl", "bread rises"])
    own = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        chances = own(**tokens).logits.log_softmax(-1)[:, relevant]
        expected = chances - torch.log1p(-chances.exp()) if len(names) > 1 else own(**tokens).logits[:, 0]
        scores = load_teacher(config, torch.float32)(tokens=tokens)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_pad_token_at_the_end_of_a_text_is_not_what_a_decoders_head_reads(tmp_path: Path) -> None:
    path = made(tmp_path, "classifier")
    config = TeacherConfig(kind="cross_encoder", path=path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokens = {"input_ids": torch.tensor([[9, 8, 7, 0]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**tokens).logits[:, 0]
        torch.testing.assert_close(load_teacher(config, torch.float32)(tokens=tokens), expected, rtol=1e-5, atol=1e-5)
