"""Every kind of scorer against its model's own numbers, and every teacher against a student of another family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.data.reads import ModelBatch
from lead_ds.errors import InputError
from lead_ds.models.kinds.colbert import ColBERT
from lead_ds.models.load import load_student, load_teacher, load_text
from lead_ds.models.scorer import Output
from lead_ds.relevance import ScoreFeatures, TokenFeatures, VectorFeatures
from tests.models.tiny_models import DECODERS, FAMILIES, tiny_model, tokens_of

LENGTHS = (5, 12, 9, 7)


def _pairs(family: str) -> dict[str, Tensor]:
    tokens = tokens_of(LENGTHS)
    tokens["input_ids"][tokens["attention_mask"] == 0] = 1 if "roberta" in family else 0
    return tokens


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cross_encoders_last_layer_is_its_own_logit(tmp_path: Path, family: str, labels: int) -> None:
    path = tiny_model(tmp_path, family, "classifier", labels=labels)
    scorer = load_teacher(TeacherConfig(kind="cross_encoder", path=path), torch.float32)
    tokens = _pairs(family)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        logits = own(**tokens).logits
        out = scorer(ModelBatch(group_size=2, pairs=tokens), layers=(0, 1, 2))
        scores = scorer(tokens=tokens)
    expected = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
    assert isinstance(out.final, ScoreFeatures)
    torch.testing.assert_close(out.final.s_KQN, expected.reshape(1, 2, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.layers.s_KQN[2], out.final.s_KQN[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out.layers.s_KQN[0], out.layers.s_KQN[1])


def test_modernberts_mean_pooled_head_is_its_own_logit(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "modernbert", "classifier", classifier_pooling="mean")
    scorer = load_teacher(TeacherConfig(kind="cross_encoder", path=path), torch.float32)
    tokens = _pairs("modernbert")
    own = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        torch.testing.assert_close(scorer(tokens=tokens), own(**tokens).logits[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*DECODERS, "cohere", "granite"])
def test_a_rerankers_last_layer_is_its_own_yes_minus_no(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path, family, "causal")
    config = TeacherConfig(kind="llm_reranker", path=path, yes_token="y", no_token="n")
    scorer = load_teacher(config, torch.float32)
    assert not any("lm_head" in name for name, _ in scorer.named_modules())
    tokens = _pairs(family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    yes, no = (tokenizer.convert_tokens_to_ids(answer) for answer in "yn")
    own = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    last = torch.tensor(LENGTHS) - 1
    with torch.no_grad():
        logits = own(**tokens).logits[torch.arange(4), last]
        out = scorer(ModelBatch(group_size=2, pairs=tokens), layers=(0, 2))
    expected = (logits[:, yes] - logits[:, no]).reshape(1, 2, 2)
    torch.testing.assert_close(out.final.s_KQN, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.layers.s_KQN[1], out.final.s_KQN[0], rtol=0, atol=1e-5)


def test_an_answer_of_several_tokens_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "llama", "causal")
    with pytest.raises(InputError, match=r"teacher\.yes_token: 'absolutely' is \d+ tokens"):
        load_teacher(TeacherConfig(kind="llm_reranker", path=path, yes_token="absolutely"), torch.float32)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_colberts_tokens_are_the_layers_states_projected(tmp_path: Path, family: str) -> None:
    path = tiny_model(tmp_path, family)
    config = StudentConfig(kind="colbert", path=path, token_dim=16, normalize=True)
    scorer = load_student(config, torch.float32).eval()
    assert isinstance(scorer, ColBERT)
    queries, passages = tokens_of((4, 6)), tokens_of(LENGTHS, seed=1)
    passages["score_mask"] = passages["attention_mask"].clone()
    passages["score_mask"][:, 1] = 0
    with torch.no_grad():
        out = scorer(ModelBatch(group_size=2, queries=queries, passages=passages), layers=(1, 2))
        own = transformers.AutoModel.from_pretrained(path).eval()
        del passages["score_mask"]
        state = own(**passages).last_hidden_state
        dense: Any = scorer.behind[0]
        expected = torch.nn.functional.normalize(state @ dense.linear.weight.T, dim=-1)
    assert out.layers.p_KPLD.shape == (2, 4, 12, 16)
    assert out.layers.p_mask_PL[:, 1].sum() == 0
    real = passages["attention_mask"] == 1
    for mine in (out.layers.p_KPLD[1], out.final.p_KPLD[0]):
        torch.testing.assert_close(mine[real], expected[real], rtol=1e-5, atol=1e-5)


QUERIES = ["which thing has three hearts", "which thing flies silently on soft feathers at night and then"]
PASSAGES = ["the octopus", "the owl flies silently", "bread rises because yeast makes gas", "a long bridge " * 6]

PAIRS = [
    ("dual_encoder", "qwen3", "base", VectorFeatures),
    ("dual_encoder", "xlm-roberta", "base", VectorFeatures),
    ("colbert", "modernbert", "base", TokenFeatures),
    ("cross_encoder", "electra", "classifier", ScoreFeatures),
    ("llm_reranker", "gemma3_text", "causal", ScoreFeatures),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_many_tokens_is_of_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """512 states of 300 sum to more than float16 holds, and bfloat16 stops counting at 256 of them."""
    config = StudentConfig(path=tiny_model(tmp_path, "bert"), pooling="mean")
    scorer = load_student(config, torch.float32).to(dtype)
    states_BLD = torch.full((1, 512, 32), 300.0, dtype=dtype)
    assert scorer.vectors_of(states_BLD, torch.ones(1, 512, dtype=torch.int64)).unique().tolist() == [300.0]


@pytest.mark.parametrize("scale", ["none", "cosine", "standard"])
@pytest.mark.parametrize(("kind", "family", "head", "features"), PAIRS)
def test_every_teacher_beside_a_student_of_another_family(
    tmp_path: Path, kind: Any, family: str, head: str, features: type, scale: Any
) -> None:
    pairs: dict[str, Any] = {"max_length": 120} if features is ScoreFeatures else {}
    pairs |= {"yes_token": "y", "no_token": "n"} if kind == "llm_reranker" else {}
    teacher_config = TeacherConfig(kind=kind, path=tiny_model(tmp_path / "t", family, head), scale=scale, **pairs)
    student_config = StudentConfig(path=tiny_model(tmp_path / "s", "distilbert", seed=1), scale=scale)
    teacher = load_teacher(teacher_config, torch.float32)
    student = load_student(student_config, torch.float32)
    outputs: list[Output] = []
    for scorer, config in ((teacher, teacher_config), (student, student_config)):
        encoder = load_text(config)
        if scorer.scope == "group":
            asked = [query for query in QUERIES for _ in range(2)]
            batch = ModelBatch(group_size=2, pairs=encoder.pairs(asked, PASSAGES))
        else:
            batch = ModelBatch(group_size=2, queries=encoder.queries(QUERIES), passages=encoder.passages(PASSAGES))
        outputs.append(scorer(batch, layers=(0, 2)))
    for output, expected in zip(outputs, (features, VectorFeatures), strict=True):
        assert isinstance(output.final, expected)
        assert isinstance(output.layers, expected)
        assert output.layers.scale == scale
        assert output.taps_queries is output.taps_passages is None
        relevance = output.layers.group_relevance(2).logits
        assert relevance.shape == (2, 2, 2)
        assert relevance.isfinite().all()
        if not isinstance(output.layers, ScoreFeatures):
            relevance = output.layers.relevance().logits
            assert relevance.shape == (2, 2, 4)
            assert relevance.isfinite().all()
    outputs[1].layers.group_relevance(2).logits.square().sum().backward()
    assert all(p.grad is not None for p in student.capture.layers.parameters())


def test_taps_are_given_where_asked(tmp_path: Path) -> None:
    scorer = load_student(StudentConfig(path=tiny_model(tmp_path, "bert")), torch.float32)
    out = scorer(ModelBatch(group_size=2, queries=tokens_of((4, 6)), passages=tokens_of(LENGTHS)), tap_layers=(2,))
    assert out.layers is None
    assert out.taps_queries is not None
    assert out.taps_passages is not None
    assert out.taps_queries[2].q.shape == (2, 4, 6, 8)
    assert out.taps_passages[2].k.shape == (4, 4, 12, 8)
    pairs = load_teacher(
        TeacherConfig(kind="cross_encoder", path=tiny_model(tmp_path / "c", "bert", "classifier")), torch.float32
    )
    out = pairs(ModelBatch(group_size=2, pairs=tokens_of(LENGTHS)), tap_layers=(0,))
    assert out.taps_passages is not None
    assert out.taps_passages[0].q.shape == (4, 4, 12, 8)


def test_a_heads_dropout_and_gradient_are_the_models_own(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert", "classifier")
    scorer = load_student(StudentConfig(kind="cross_encoder", path=path), torch.float32)
    assert scorer.training
    batch = ModelBatch(group_size=2, pairs=tokens_of(LENGTHS))
    assert not torch.equal(scorer(batch).final.s_KQN, scorer(batch).final.s_KQN)
    scorer(batch, layers=(0,)).layers.s_KQN.sum().backward()
    assert scorer.model.classifier.weight.grad is not None
    reached = [layer.output.dense.weight.grad.count_nonzero() > 0 for layer in scorer.capture.layers]
    assert reached == [True, False, False]
