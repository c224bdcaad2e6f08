"""Tiny rerankers in published formats, and the code of their cards in plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from tests.helpers.tiny import tiny_tokenizer
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


def made(folder: Path, head: str = "causal", chat: str | None = None, *, positions: int = 4096, **shape: Any) -> str:
    """A decoder whose tokenizer knows the marks and answers of published rerankers."""
    path = tiny_model(folder, "qwen3", head, layers=2, max_position_embeddings=positions, **shape)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<bos>"]})
    tokenizer.add_tokens(["yes", "no", "Yes"])
    tokenizer.bos_token, tokenizer.pad_token, tokenizer.model_max_length = "<bos>", "<|endoftext|>", positions
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(path)
    auto = {"causal": transformers.AutoModelForCausalLM, "classifier": transformers.AutoModelForSequenceClassification}
    auto |= {"base": transformers.AutoModel}
    model = auto[head].from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(5))
        if head == "causal":
            model.get_output_embeddings().weight.normal_(generator=torch.Generator().manual_seed(6))
    model.save_pretrained(path)
    return path


def logits(path: str, rows: list[list[int]]) -> Tensor:
    """[B, V]: of the last token, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])


def qwen3_card(path: str, pairs: list[tuple[str, str]], length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    head, tail = (tokenizer.encode(text, add_special_tokens=False) for text in (prefix, suffix))
    task = "Given a web search query, retrieve relevant passages that answer the query"
    texts = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {passage}" for query, passage in pairs]
    room = length - len(head) - len(tail)
    bodies = tokenizer(texts, padding=False, truncation="longest_first", max_length=room)["input_ids"]
    said = logits(path, [head + body + tail for body in bodies])
    return said[:, tokenizer.convert_tokens_to_ids("yes")] - said[:, tokenizer.convert_tokens_to_ids("no")]


def only_second(first: list[int], second: list[int], length: int) -> list[int]:
    """`prepare_for_model(truncation="only_second")` of transformers 4."""
    excess = len(first) + len(second) - length
    return first + (second[: len(second) - excess] if 0 < excess < len(second) else second)


def bge_gemma_card(path: str, pairs: list[tuple[str, str]], length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def ids(text: str, **cut: Any) -> list[int]:
        return tokenizer(text, add_special_tokens=False, **cut)["input_ids"]

    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    rows = []
    for query, passage in pairs:
        first = ids(f"A: {query}", max_length=length * 3 // 4, truncation=True)
        second = ids(f"B: {passage}", max_length=length, truncation=True)
        body = only_second([tokenizer.bos_token_id, *first], ids("\n") + second, length)
        rows.append(body + ids("\n") + ids(prompt))
    return logits(path, rows)[:, ids("Yes")[0]]


def mxbai_card(path: str, pairs: list[tuple[str, str]], length: int) -> Tensor:
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
    for query, passage in pairs:
        first = ids(f"query: {query}", max_length=length * 3 // 4, truncation=True)
        second = ids(f"document: {passage}", max_length=length, truncation=True)
        rows.append(prefix + only_second(first, ids("\n") + second, length) + ids("\n") + ids(task) + suffix)
    said = logits(path, rows)
    return said[:, ids("1")[0]] - said[:, ids("0")[0]]


def zerank_card(path: str, pairs: list[tuple[str, str]], length: int) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="right")
    rows = []
    for query, passage in pairs:
        said = [("system", query[:2_000].strip()), ("user", passage[:10_000].strip())]
        messages = [{"role": role, "content": text} for role, text in said]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append(tokenizer(text)["input_ids"])
    return logits(path, rows)[:, tokenizer.encode("Yes", add_special_tokens=False)[0]] / 5.0


def answering(folder: Path, family: str, answers: tuple[str, str], *, tied: bool) -> str:
    """A whole T5 whose tokenizer ends a text with </s> and has each answer as a word of its own."""
    path = str(tiny_tokenizer(folder, "unigram"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] += [[f"▁{answer}", -5.0] for answer in answers]
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    whole = {"type": "TemplateProcessing", "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    state["post_processor"] = whole | {"single": [first, end], "pair": [first, end, second, end]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    kept = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **kept)
    fast.save_pretrained(path)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    shape |= {"vocab_size": len(fast), "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    shape |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def monot5_card(path: str, pairs: list[tuple[str, str]], length: int, answers: tuple[str, str]) -> Tensor:
    """Its first generated token: the logit of the first answer over that of the second."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(f"▁{answer}") for answer in answers)
    found = []
    for query, passage in pairs:
        text = f"Query: {query} Document: {passage} Relevant:"
        read = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        start = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():
            said = model(input_ids=read["input_ids"], decoder_input_ids=start).logits[0, 0]
        found.append(said[yes] - said[no])
    return torch.stack(found)


CARDS: dict[str, tuple[Callable[[str, list[tuple[str, str]], int], Tensor], str, tuple[int, ...]]] = {
    "qwen3": (qwen3_card, "Qwen3-Reranker-0.6B", (4096, 280)),
    "bge_gemma": (bge_gemma_card, "bge-reranker-v2-gemma", (4096, 60)),
    "mxbai": (mxbai_card, "mxbai-rerank-large-v2", (3000, 60)),
    "zerank": (zerank_card, "zerank-1-small", (4096,)),
}


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
