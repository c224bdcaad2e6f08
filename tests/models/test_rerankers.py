"""Rerankers as their cards' code and sentence-transformers read them: prompt, answer, label and what of a long text is cut."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lead_ds.config import TeacherConfig
from lead_ds.errors import InputError
from lead_ds.models.load import kind_of, load_scorer, load_teacher, load_text
from tests.models.reranker_cards import (
    CARDS,
    CHAT,
    JUDGE,
    PAIRS,
    PASSAGES,
    QUERIES,
    answering,
    made,
    monot5_card,
    scored,
)
from tests.models.tiny_models import tiny_model


def ours(path: str, kind: str = "llm_reranker", **settings: Any) -> Tensor:
    config = TeacherConfig(kind=kind, path=path, **settings)
    encoder = pickle.loads(pickle.dumps(load_text(config)))
    with torch.no_grad():
        return load_teacher(config, torch.float32)(tokens=encoder.pairs(QUERIES, PASSAGES))


@pytest.mark.parametrize("name", CARDS)
def test_a_published_reranker_scores_as_its_cards_code(tmp_path: Path, name: str) -> None:
    card, repository, lengths = CARDS[name]
    path = made(tmp_path / repository, chat=CHAT if name == "zerank" else None)
    for length in lengths:
        expected = card(path, PAIRS, length)
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


def test_a_monot5_is_read_where_it_begins_to_answer(tmp_path: Path) -> None:
    answers = ("true", "false")
    path = answering(tmp_path / "monot5-tiny", "t5", answers, tied=True)
    assert kind_of(path) == "llm_reranker"
    scores = ours(path)
    torch.testing.assert_close(scores, monot5_card(path, PAIRS, 128, answers), rtol=2e-5, atol=2e-5)
    config = TeacherConfig(kind="llm_reranker", path=path)
    teacher, encoder = load_teacher(config, torch.float32), load_text(config)
    with torch.no_grad():
        layers = teacher(tokens=encoder.pairs(QUERIES, PASSAGES), layers=[0, 1, 2])  # of the decoder, which has three
    torch.testing.assert_close(layers[2:], scores.expand(2, -1), rtol=1e-5, atol=1e-5)
    assert (layers[0] - scores).abs().max() > 1e-3
    prompt = encoder.pairs(["owl"], ["crab"])["input_ids"]
    said = "Query: {query} Document: {passage} Relevant:"  # the same, as a prompt of one's own, with its </s>
    again = load_text(config.model_copy(update={"template": said})).pairs(["owl"], ["crab"])["input_ids"]
    assert again.tolist() == prompt.tolist()
    with pytest.raises(InputError, match=r"of another architecture than the model \(use one of monot5, monomt5\)"):
        ours(path, template="qwen3")
    with pytest.raises(InputError, match="no file of it says how"):
        ours(answering(tmp_path / "other", "t5", answers, tied=True))
    with pytest.raises(InputError, match="use one of plain, pair, qwen3"):
        ours(made(tmp_path / "decoder"), template="monot5")


def reference(path: str, length: int | None = None) -> Tensor:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(path, device="cpu")
    if length is not None:
        model[0].tokenizer.model_max_length = length
    return model.predict(PAIRS, batch_size=1, activation_fn=torch.nn.Identity(), convert_to_tensor=True).clone()


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
    for template in ("qwenn3", "{query} alone"):  # a misspelt name would be asked as the same text for every pair
        with pytest.raises(InputError, match=r"is no name of a template and lacks .*use one of plain, pair, qwen3"):
            ours(path, "cross_encoder", template=template)


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
