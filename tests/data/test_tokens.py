import json
import pickle
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.models.load import load_text
from tests.helpers.tiny import tiny_texts

QUERIES = ["which thing hunts crabs at night", "octopus", ""]
PASSAGES = ["The octopus hunts crabs at night. People wrote about this long ago.", "The clock.", ""]
KINDS = ["wordpiece", "unigram", "bpe"]


@pytest.fixture
def model(tokenizer: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """A directory with a tokenizer of a kind, a config.json and other files."""

    def make(kind: str = "wordpiece", config: dict[str, Any] | None = None, **files: Any) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        for path in Path(tokenizer(kind)).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if config:
            (folder / "config.json").write_text(json.dumps(config))
        for name, tree in files.items():
            path = folder / (name.replace("__", "/") + ".json")
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(tree))
        return str(folder)

    return make


def student(path: str, **settings: Any) -> TextEncoder:
    return load_text(StudentConfig(path=path, **settings))


def teacher(path: str, kind: str, **settings: Any) -> TextEncoder:
    return load_text(TeacherConfig(path=path, kind=kind, **settings))


def real(tokens: dict[str, torch.Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_tokenizer_padded_on_the_right(tokenizer: Callable[..., str], kind: str) -> None:
    encoder = student(tokenizer(kind), query_length=64)
    tokens = encoder.queries(QUERIES)
    expected = [encoder.tokenizer(text)["input_ids"] or [encoder.tokenizer.pad_token_id] for text in QUERIES]
    assert real(tokens) == expected
    assert all(tensor.shape == (3, max(map(len, expected))) for tensor in tokens.values())
    assert all(tensor.dtype == torch.int64 for tensor in tokens.values())
    assert (tokens["attention_mask"].diff(dim=1) <= 0).all()
    padding = tokens["input_ids"][tokens["attention_mask"] == 0]
    assert set(padding.tolist()) == {encoder.tokenizer.pad_token_id}


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_prompts(tokenizer: Callable[..., str], kind: str) -> None:
    path = tokenizer(kind)
    encoder = student(path, query_length=6, passage_length=9, query_prompt="which ", passage_prompt="The ")
    plain = student(path)
    assert encoder.queries(PASSAGES)["input_ids"].shape[1] == 6
    assert encoder.passages(PASSAGES)["input_ids"].shape[1] == 9
    assert real(encoder.passages(["clock."], length=50)) == real(plain.passages(["The clock."]))
    assert real(encoder.queries(["thing"], length=50)) == real(plain.queries(["which thing"]))
    whole = plain.tokenizer(PASSAGES[0])["input_ids"]
    ends = 1 if kind != "bpe" else 0
    assert real(plain.passages(PASSAGES[:1], length=9))[0] == whole[: 9 - ends] + whole[len(whole) - ends :]


def test_reading_again_is_unaffected_by_a_shorter_read(tokenizer: Callable[..., str], tmp_path: Path) -> None:
    encoder = student(tokenizer())
    before = encoder.passages(PASSAGES)
    encoder.queries(PASSAGES, length=4)
    assert torch.equal(encoder.passages(PASSAGES)["input_ids"], before["input_ids"])
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"] is None


def test_prompts_come_from_the_model_unless_given(model: Callable[..., str]) -> None:
    files = {"config_sentence_transformers": {"prompts": {"query": "query: ", "document": "passage: "}}}
    encoder = student(model(**files))
    assert (encoder.query_prompt, encoder.passage_prompt) == ("query: ", "passage: ")
    encoder = student(model(**files), query_prompt="", passage_prompt="x ")
    assert (encoder.query_prompt, encoder.passage_prompt) == ("", "x ")
    encoder = student(model(config_sentence_transformers={"prompts": {"passage": "p: "}}))
    assert (encoder.query_prompt, encoder.passage_prompt) == ("", "p: ")
    pylate = {"query_prefix": "[Q] ", "document_prefix": "[D] "}
    encoder = teacher(model(config_sentence_transformers=pylate), "colbert")
    assert (encoder.query_prompt, encoder.passage_prompt) == ("[Q] ", "[D] ")


def test_token_types_are_given_where_the_model_uses_them(model: Callable[..., str]) -> None:
    bert = {"model_type": "bert", "type_vocab_size": 2}
    tokens = teacher(model(config=bert), "cross_encoder").pairs(["octopus", "a"], ["clock", "clock rings"])
    assert tokens["token_type_ids"].tolist()[0][: tokens["attention_mask"][0].sum()].count(1) > 1
    assert tokens["token_type_ids"][tokens["attention_mask"] == 0].sum() == 0
    assert "token_type_ids" in student(model(config=bert)).queries(QUERIES)
    assert "token_type_ids" not in student(model(config={"model_type": "distilbert"})).queries(QUERIES)
    assert "token_type_ids" not in student(model("unigram")).queries(QUERIES)


DECODER = {"model_type": "llama"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_ends_with_eos_where_the_last_token_is_pooled(
    model: Callable[..., str], kind: str, tmp_path: Path
) -> None:
    encoder = student(model(kind), pooling="last", passage_length=8)
    end = encoder.tokenizer.sep_token_id if kind == "wordpiece" else encoder.tokenizer.eos_token_id
    for ids in [*real(encoder.passages(PASSAGES)), *real(encoder.queries(QUERIES))]:
        assert ids[-1] == end
        assert len(ids) == 1 or ids[-2] != end or len(ids) == 2  # added once
    plain = student(model(kind), pooling="cls")
    added = kind == "bpe"
    assert len(real(encoder.queries(QUERIES))[0]) == len(real(plain.queries(QUERIES))[0]) + added
    # A student saved with this tokenizer reads text in the same way wherever it is loaded.
    encoder.tokenizer.save_pretrained(tmp_path / "model")
    again = student(str(tmp_path / "model"), pooling="cls", passage_length=8)
    assert real(again.passages(PASSAGES)) == real(encoder.passages(PASSAGES))
    both = student(str(tmp_path / "model"), pooling="last", passage_length=8)
    assert real(both.passages(PASSAGES)) == real(encoder.passages(PASSAGES))


def test_which_models_pool_the_last_token(model: Callable[..., str], tmp_path: Path) -> None:
    def ends(path: str, **settings: Any) -> bool:
        encoder = student(path, **settings)
        return real(encoder.queries(["octopus"]))[0][-1] == encoder.tokenizer.eos_token_id

    assert ends(model("bpe", DECODER))
    assert not ends(model("bpe", DECODER), pooling="mean")
    assert not ends(model("bpe", {"model_type": "bert"}))
    # A model that sentence-transformers saved reads as it does there, where nothing is appended.
    modules = [{"idx": 0, "name": "0", "type": "sentence_transformers.models.Transformer", "path": ""}]
    modules += [{"idx": 1, "name": "1", "type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    for pooling in ({"pooling_mode_lasttoken": True}, {"pooling_mode": "lasttoken"}):
        files = {"1_Pooling__config": {"word_embedding_dimension": 8, **pooling}}
        assert not ends(model("bpe", DECODER, modules=modules, **files))
    for file in ("modules.json", "1_Pooling/config.json"):
        (tmp_path / "model" / file).unlink()
    tokenized = teacher(model("bpe", DECODER), "colbert").passages(["octopus"])
    assert real(tokenized)[0][-1] != student(model("bpe"), pooling="cls").tokenizer.eos_token_id


def test_eos_follows_bos_where_the_tokenizer_adds_only_that(model: Callable[..., str], tmp_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = Path(model("bpe"))
    bare = AutoTokenizer.from_pretrained(folder)
    bare.add_special_tokens({"bos_token": "<|start|>"})
    template = processors.TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", bare.bos_token_id)]
    )
    bare.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    bare.save_pretrained(folder)
    encoder = student(str(folder), pooling="last", query_length=4)
    [ids] = real(encoder.queries(["octopus hunts crabs"]))
    assert (ids[0], ids[-1], len(ids)) == (bare.bos_token_id, bare.eos_token_id, 4)


def test_a_missing_pad_token_becomes_eos(tokenizer: Callable[..., str], model: Callable[..., str]) -> None:
    encoder = student(tokenizer("bpe"))
    assert encoder.tokenizer.pad_token == "<|endoftext|>"
    folder = Path(model("bpe"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(InputError, match="neither a pad nor an eos token"):
        student(str(folder))


def test_colbert_queries_expand_with_mask_tokens_that_count_and_are_not_attended(tokenizer: Callable[..., str]) -> None:
    encoder = teacher(tokenizer(), "colbert", query_expansion=True, query_length=12)
    tokens = encoder.queries(["octopus", "which thing hunts crabs at night by day"])
    assert tokens["input_ids"].shape == (2, 12)
    unattended = tokens["attention_mask"] == 0
    assert unattended[0].any()
    assert set(tokens["input_ids"][unattended].tolist()) == {encoder.tokenizer.mask_token_id}
    assert tokens["score_mask"].all()
    plain = teacher(tokenizer(), "colbert", query_length=12).queries(["octopus", "a"])
    assert torch.equal(plain["score_mask"], plain["attention_mask"])
    # As in sentence-transformers, EOS stands in for a mask token that there is not.
    ends = teacher(tokenizer("bpe"), "colbert", query_expansion=True)
    assert ends.queries(["a"])["input_ids"][0, -1] == ends.tokenizer.eos_token_id
    assert "score_mask" not in student(tokenizer()).queries(["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_colbert_punctuation_of_passages_does_not_count(tokenizer: Callable[..., str], kind: str) -> None:
    encoder = teacher(tokenizer(kind), "colbert", mask_punctuation=True)
    tokens = encoder.passages(["The clock. People, this .", "owl"])
    for ids, real_mask, counts in zip(tokens["input_ids"], tokens["attention_mask"], tokens["score_mask"], strict=True):
        words = encoder.tokenizer.convert_ids_to_tokens(ids.tolist())
        marks = torch.tensor(
            [word in string.punctuation for word in words]
        )  # sentence-transformers': these tokens exactly
        assert torch.equal(counts, real_mask * (~marks).long())
    assert kind == "unigram" or tokens["score_mask"][0].sum() < tokens["attention_mask"][0].sum()
    assert torch.equal(encoder.queries(["a, b"])["score_mask"], encoder.queries(["a, b"])["attention_mask"])
    plain = teacher(tokenizer(kind), "colbert").passages(["a, b."])
    assert torch.equal(plain["score_mask"], plain["attention_mask"])


def test_colbert_markers_of_the_vocabulary_stay_whole(tokenizer: Callable[..., str]) -> None:
    encoder = teacher(tokenizer(), "colbert", query_prompt="[MASK] ", passage_prompt="##nts ")
    size = len(encoder.tokenizer)
    assert real(encoder.passages(["octopus"]))[0][1] == encoder.tokenizer.get_vocab()["##nts"]
    assert len(encoder.tokenizer) == size == 400


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_cross_encoder_pairs_cut_the_longer_text(tokenizer: Callable[..., str], kind: str) -> None:
    encoder = teacher(tokenizer(kind), "cross_encoder", max_length=20)
    tokens = encoder.pairs(["octopus", PASSAGES[0]], [PASSAGES[0], "owl"])
    expected = encoder.tokenizer(
        ["octopus", PASSAGES[0]], [PASSAGES[0], "owl"], truncation="longest_first", max_length=20
    )["input_ids"]
    assert real(tokens) == expected
    assert tokens["input_ids"].shape == (2, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reranker_prompt_loses_passage_and_nothing_else(tokenizer: Callable[..., str], kind: str) -> None:
    template = "Task: {instruction} | {passage} is what {query} wants? yes or no:"
    settings = {"template": template, "instruction": "judge {passage}", "max_length": 90}
    encoder = teacher(tokenizer(kind), "llm_reranker", **settings)
    long = " ".join(tiny_texts())[:4000]
    tokens = encoder.pairs([QUERIES[0], QUERIES[0]], ["a clock", long])
    short, cut = (encoder.tokenizer.decode(ids) for ids in real(tokens))
    assert len(real(tokens)[1]) == 90
    head = "Task: judge {passage} | "
    tail = f" is what {QUERIES[0]} wants? yes or no:"
    whole = encoder.tokenizer(head + "a clock" + tail, add_special_tokens=False)["input_ids"]
    assert real(tokens)[0][-len(whole) :] == whole
    assert short != cut
    short_ids, cut_ids = real(tokens)
    common = len(encoder.tokenizer(tail, add_special_tokens=False)["input_ids"]) - 1
    assert cut_ids[-common:] == short_ids[-common:]  # the prompt's end, the question in it
    start = len(encoder.tokenizer(head, add_special_tokens=False)["input_ids"]) - 2
    assert cut_ids[:start] == short_ids[:start]
    kept = encoder.tokenizer(head + long, add_special_tokens=False)["input_ids"]
    assert (
        cut_ids[-80 : -common - 2] == kept[len(cut_ids) - 80 - len(encoder.template.leading) :][: 78 - common]
    )  # its beginning
    leading = [] if kind == "bpe" else [encoder.tokenizer.cls_token_id]
    assert cut_ids[: len(leading)] == leading
    assert cut_ids[-1] not in (encoder.tokenizer.sep_token_id, encoder.tokenizer.eos_token_id)


@pytest.mark.parametrize("template", ["{query} ? {passage} :", "{passage} ! {query} :", "plain"])
def test_a_question_of_any_length_is_cut_and_leaves_room_for_a_passage(
    tokenizer: Callable[..., str], template: str
) -> None:
    encoder = teacher(tokenizer("bpe"), "llm_reranker", template=template, max_length=160)
    question, passage = "which thing strikes the hour with a bell " * 220, "the clock " * 40
    cut, short = real(encoder.pairs([question, "bell"], [passage, "clock"]))
    assert len(question) > 9000
    assert len(cut) == 160
    text, asked = encoder.tokenizer.decode(cut), encoder.tokenizer.decode(short).rpartition("bell")[0]
    assert text.count("the hour") >= 2
    assert text.count("the clock") >= 2
    assert cut[-1] == short[-1]
    if template != "{passage} ! {query} :":
        assert text.startswith(asked)
    [bare] = real(encoder.pairs([question], [""]))
    assert len(bare) == 160  # a query has all the room that its passage does not need


def test_encoders_travel_between_processes(tokenizer: Callable[..., str]) -> None:
    encoder = teacher(tokenizer("bpe"), "llm_reranker", template="plain", max_length=64)
    again = pickle.loads(pickle.dumps(encoder))
    assert real(again.pairs(QUERIES, PASSAGES)) == real(encoder.pairs(QUERIES, PASSAGES))


def test_encoders_serve_several_threads(tokenizer: Callable[..., str]) -> None:
    encoder = student(tokenizer())
    lengths = [4 + i % 9 for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda length: encoder.passages(PASSAGES * 20, length)["input_ids"].shape[1], lengths))
    assert found == lengths


def test_models_that_cannot_be_read(tmp_path: Path, model: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="no such folder"):
        student(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no tokenizer files"):
        student(str(tmp_path / "empty"))
    path = Path(model())
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        student(str(path))
    (path / "modules.json").write_text("[")
    with pytest.raises(InputError, match=r"modules.json: not readable as JSON"):
        student(str(path))


def test_lengths_beyond_the_models_positions(model: Callable[..., str]) -> None:
    bert = {"model_type": "bert", "max_position_embeddings": 64}
    with pytest.raises(InputError, match="passage_length is 65, the model has 64 positions"):
        student(model(config=bert), passage_length=65)
    student(model(config=bert), passage_length=64)
    roberta = {"model_type": "roberta", "max_position_embeddings": 66}
    with pytest.raises(InputError, match="max_length is 65, the model has 64 positions"):
        teacher(model(config=roberta), "cross_encoder", max_length=65)
    teacher(model(config=roberta), "cross_encoder", max_length=64)  # passage_length, 128, is not used by pairs
