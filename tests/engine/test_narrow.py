"""Students cut in width: what does nothing goes, what is left is a plain model, and a run goes on with the same choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lead_ds.config import StudentConfig
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder, load_student, load_text
from lead_ds.models.narrow import Importance, Sizes, chosen, narrow, sizes_after
from lead_ds.plan.requirements import meta_model
from lead_ds.settings.roles import WidthConfig
from tests.engine.jobs import distil_each
from tests.engine.running import copy_run
from tests.helpers.launch import launch

TEXTS = ["the owl flies silently", "a glacier"]


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_what_does_nothing_is_cut(architecture: str, tmp_path: Path, rooms: Path) -> None:
    folder = rooms / "student" if architecture == "bert" else saved_roberta(tmp_path)
    student = load_student(StudentConfig(path=str(folder), normalize=True, projection=8), torch.float32).eval()
    layers = list(student.capture.layers)
    have = Sizes.of(student.model.config)
    size = have.hidden // have.heads
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.intermediate.dense.bias[i % 2 :: 2] = -1e4  # GELU gives 0
            value = layer.attention.self.value
            value.weight[:size] = value.bias[:size] = 0  # the first head says nothing
        norms = [module for module in student.backbone.modules() if isinstance(module, torch.nn.LayerNorm)]
        for norm in norms:
            norm.weight[5 : 5 + size] = norm.bias[5 : 5 + size] = 0
    tokens = load_text(student.config).passages(TEXTS)
    importance = Importance(student)
    with torch.no_grad(), importance.reading():
        before = student.embed(tokens)
    feed_forward = chosen(importance.sums, Sizes(have.hidden, have.heads, have.feed_forward // 2))
    assert feed_forward["feed_forward.0"].tolist() == list(range(1, have.feed_forward, 2))
    student = narrow(student, feed_forward)
    with torch.no_grad():
        torch.testing.assert_close(student.embed(tokens), before, atol=1e-5, rtol=0)
    kept = chosen(importance.sums, sizes_after(WidthConfig(heads=have.heads - 1), student))
    assert kept["heads.0"].tolist() == list(range(1, have.heads))
    assert set(range(have.hidden)) - set(kept["hidden"].tolist()) == set(range(5, 5 + size))
    kept |= {name: torch.arange(len(x)) for name, x in feed_forward.items() if name.startswith("feed")}
    student = narrow(student, kept)
    assert student.embed(tokens).shape == (2, 8)
    assert student.model.config.hidden_size == have.hidden - size


def test_cut_trained_resumed_and_served(configure: Callable[..., Path], tmp_path: Path, rooms: Path) -> None:
    width = {"hidden": 12, "feed_forward": 20, "sample": 48}
    student: dict[str, Any] = {"path": "student", "normalize": True, "passage_length": 48, "width": width}
    train: dict[str, Any] = {"steps": 4, "batch_size": 4, "lr": 0.01, "save_every": 2}
    alone = configure("alone", student=student, train=train)
    both = configure("both", student=student, train={**train, "batch_size": 2})
    [whole] = distil_each([str(alone)])
    kept = tmp_path / "alone" / "narrowed.safetensors"
    again, broken = copy_run(alone, "again", step=2), copy_run(alone, "broken", step=2)
    (tmp_path / "again" / kept.name).write_bytes(kept.read_bytes())
    (tmp_path / "broken" / kept.name).write_bytes(kept.read_bytes()[:-8] + b"\1" + b"\0" * 7)
    resumed, refused = distil_each([str(again), str(broken)], resume=True)
    assert resumed == whole
    assert "narrowed.safetensors: does not hold what the student was cut to" in refused
    [[split], _] = launch("tests.engine.jobs:distil_each", 2, configs=[str(both)])
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    ours, theirs = load_file(kept), load_file(tmp_path / "both" / kept.name)
    assert {name: x.tolist() for name, x in ours.items()} == {name: x.tolist() for name, x in theirs.items()}

    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "alone" / "student"
    saved = json.loads((folder / "config.json").read_text())
    assert [saved[name] for name in ("hidden_size", "intermediate_size")] == [12, 20]
    scorer, encoder = load_encoder(folder)
    served = SentenceTransformer(str(folder), device="cpu").encode_document(TEXTS, convert_to_tensor=True)
    assert served.shape == (2, 12)
    with torch.no_grad():
        torch.testing.assert_close(scorer.embed(encoder.passages(TEXTS)), served, atol=1e-5, rtol=0)
    planned = meta_model(
        StudentConfig(path=str(rooms / "student"), normalize=True, width=WidthConfig(**width)), "student"
    )
    assert planned[1].numel == sum(p.numel() for p in scorer.parameters())


@pytest.mark.parametrize(
    ("path", "width", "told"),
    [
        ("student", {"hidden": 13}, "width.hidden: is 13, and a bert is as wide as its heads together"),
        ("student", {"hidden": 16, "heads": 1}, "width.heads: is 1, and 16 hidden dimensions are those of"),
        ("student", {"feed_forward": 999}, "width.feed_forward: is 999, and the model has"),
        ("llama", {"feed_forward": 8}, "is a llama, and only models of bert, roberta"),
    ],
)
def test_what_cannot_be_cut_is_refused(path: str, width: dict[str, int], told: str, rooms: Path) -> None:
    settings = StudentConfig(path=str(rooms / path), width=width)
    with pytest.raises(InputError, match=told):
        sizes_after(settings.width, load_student(settings, torch.float32))


def saved_roberta(folder: Path) -> Path:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from tests.helpers.tiny import tiny_tokenizer

    torch.manual_seed(0)
    shape = XLMRobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=130,
        pad_token_id=1,
    )
    XLMRobertaModel(shape, add_pooling_layer=False).save_pretrained(folder)
    tiny_tokenizer(folder, "unigram")
    return folder
