"""Features two by two: a pair is refused in one line, or it trains, and what changes only how leaves the loss as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import normalize

from lead_ds.config import load_config
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder
from tests.engine.jobs import losses_of
from tests.helpers.rooms import TEACHERS, settings
from tests.models.tiny_models import tiny_model

OFF = {name: {"weight": 0.0} for name in ("contrastive", "response", "layer")}
TRAIN = {"steps": 2, "batch_size": 4, "save_every": 1, "evaluate_every": 0, "keep": 2}
TEXTS = ["what is a river", "the river runs past a long wall and into the sea", "stone"]
Change = Callable[[dict[str, Any], Path], None]


def put(**sections: Any) -> Change:
    """Settings laid over those of a run."""

    def laid(tree: dict[str, Any], values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and isinstance(tree.get(name), dict):
                laid(tree[name], value)
            else:
                tree[name] = value

    return lambda tree, _: laid(tree, json.loads(json.dumps(sections)))


def mixed(tree: dict[str, Any], folder: Path) -> None:
    other = {"path": str(folder / "other"), "prompts": {"query": "say: "}}
    tree["data"] = {"sets": [{"path": tree["data"]["path"]}, other], "negatives": 2}


def taught(*spans: dict[str, int]) -> Change:
    def change(tree: dict[str, Any], folder: Path) -> None:
        bert = {**TEACHERS["dual_encoder"], "path": str(folder / "bert"), "dtype": "fp32", "passage_length": 48}
        tree["teachers"] = [{**tree.pop("teacher"), **spans[0]}, {**bert, **spans[1]}]

    return change


def masked(tree: dict[str, Any], folder: Path) -> None:
    tree["student"] = {"kind": "sparse", "path": str(folder / "masked")}
    put(losses={"embedding": {"weight": 0.0}, "flops": {"weight": 0.01, "warmup_steps": 2}})(tree, folder)


WHAT: dict[str, Change] = {
    "texts": put(data={"format": "texts", "train": "alone", "negatives": 0}, losses=OFF),
    "mixture": mixed,
    "sparse": masked,
    "several": taught({}, {}),
    "dims": put(student={"dims": [8, 16]}),
    "int8": put(student={"quantize": "int8"}),
    "width": put(student={"width": {"feed_forward": 16}}),
    "pca": put(losses={"embedding": {"into": "pca"}}),
    "truncate": put(losses={"embedding": {"into": "truncate"}}),
    "keep": put(losses={"embedding": {"keep": True, "start": "ridge"}}),
    "layers": put(losses={"embedding": {"teacher_layers": [1], "student_layers": [0]}}),
    "vectors": put(losses={name: {"weight": 1.0} for name in ("similarity", "spread", "order")}),
    "focal": put(losses={"focal": {"weight": 1.0}}),
    "schedule": put(data={"schedule": "easy_to_hard", "train": "scored.jsonl"}),
    "concatenate": put(mix={"vectors": "concatenate"}),
}
# What leaves a run's first loss as it is.
HOW: dict[str, Change] = {
    "growing": taught({"until": 1}, {"after": 1}),
    "grad_cache": put(train={"grad_cache": 2}),
    "packed": put(student={"passes": "packed"}),
    "checkpointing": put(train={"gradient_checkpointing": True}),
    "lora": put(train={"lora": {"r": 2}}),
    "average": put(train={"average": 2}),
    "zero3": put(deepspeed={"student": "ds_configs/student_zero3.json"}),
}
# Refused by the configuration alone.
ALONE = {"concatenate": "mix.vectors: concatenate is ignored"}
PAIRS = {
    ("sparse", "dims"): "student.dims: is ignored by a sparse",
    ("sparse", "int8"): "student.quantize: is ignored by a sparse",
    ("texts", "schedule"): "data: schedule is ignored without negatives",
    ("concatenate", "growing"): "mix.vectors: concatenate: teachers of losses.embedding teach at different steps",
    ("grad_cache", "packed"): "student.passes: packed: train.grad_cache makes passes of its own",
    ("lora", "average"): "train.average: averages whole weights",
}


@pytest.fixture(scope="module")
def folder(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of all features."""
    root = tmp_path_factory.mktemp("pairs")
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_model(root / "made", "bert", "masked", layers=2, **quiet)
    shutil.move(str(next((root / "made").rglob("config.json")).parent), root / "masked")
    for name in ("bert", "data"):
        shutil.copytree(rooms / name, root / name)
    shutil.copytree(rooms / "data", root / "other")
    (root / "data" / "alone").mkdir(exist_ok=True)
    for file in ("corpus", "queries"):
        lines = (root / "data" / f"{file}.jsonl").read_text().splitlines()
        (root / "data" / "alone" / f"{file}.txt").write_text("\n".join(json.loads(line)["text"] for line in lines))
    groups = [json.loads(line) for line in (root / "data" / "train.jsonl").read_text().splitlines()]
    for group in groups:
        names = [*group["positives"], *group["negatives"]]
        group["scores"] = {name: float(len(names) - place) for place, name in enumerate(names)}
    (root / "data" / "scored.jsonl").write_text("\n".join(map(json.dumps, groups)))
    return root


def written(rooms: Path, folder: Path, *names: str) -> Path:
    """The configuration of a run with some features."""
    losses = {"layer": {"weight": 0.0}, "embedding": {"weight": 1.0}}
    tree = settings(rooms, folder / "+".join(names), train=TRAIN, losses=losses, evaluation={"split": None})
    tree["data"]["path"] = str(folder / "data")
    for name in names:
        (WHAT | HOW | {"wide": put(student={"dims": [8, 32]})})[name](tree, folder)  # as wide as the map that is kept
    path = folder / f"{'+'.join(names)}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_pair_is_taken_or_refused_in_one_line(rooms: Path, folder: Path) -> None:
    exclusive = {("several", "growing"), ("texts", "mixture"), ("mixture", "schedule")}  # write the same settings
    for one, other in combinations([*WHAT, *HOW], 2):
        pair = (one, other)
        if pair in exclusive or {one, other} <= {"pca", "truncate", "keep"}:
            continue
        path, told = written(rooms, folder, one, other), PAIRS.get(pair)
        if told is None and "concatenate" in pair and "several" not in pair:
            told = ALONE["concatenate"]
        if told is None:
            load_config(path)
            continue
        with pytest.raises(InputError) as refused:
            load_config(path)
        assert told in str(refused.value), pair
        assert "\n" not in str(refused.value)


RUNS = [
    *("texts+growing", "texts+grad_cache", "texts+packed", "texts+layers+dims"),
    *("mixture+growing", "mixture+grad_cache", "mixture+dims+int8"),
    *("sparse+growing", "sparse+grad_cache", "sparse+packed"),
    *("several+packed", "several+dims+grad_cache", "several+concatenate+dims"),
    *("dims+growing", "dims+zero3", "int8+lora", "width+checkpointing", "width+average"),
    *("pca+growing", "truncate+dims", "keep+zero3", "layers+growing", "layers+texts+grad_cache"),
    *("vectors+growing", "focal+packed", "schedule+growing"),
]


@pytest.mark.parametrize("run", RUNS)
def test_a_pair_trains_and_how_leaves_the_loss(rooms: Path, folder: Path, run: str) -> None:
    names = run.split("+")

    def first(*names: str) -> float:
        output = folder / "+".join(names)
        if not output.exists():
            distill(load_config(written(rooms, folder, *names)), quiet=True)
        return losses_of(output)[0]

    plain = [name for name in names if name not in HOW]
    assert first(*names) > 0
    if plain != names:
        assert first(*names) == pytest.approx(first(*plain), rel=1e-4 if "packed" in names else 1e-5)
    else:
        assert first(*names) != first(*names[:-1])


@pytest.mark.parametrize("run", ["keep+wide", "int8+lora", "width+average", "texts+dims", "layers+growing"])
def test_what_is_saved_is_read_alike_by_sentence_transformers(rooms: Path, folder: Path, run: str) -> None:
    from sentence_transformers import SentenceTransformer

    names = run.split("+")
    if not (folder / run / "student").exists():
        distill(load_config(written(rooms, folder, *names)), quiet=True)
    student = folder / run / "student"
    scorer, encoder = load_encoder(student)
    for dim in (None, 8) if {"dims", "wide"} & {*names} else (None,):
        theirs = SentenceTransformer(str(student), device="cpu", truncate_dim=dim)
        for tokens, said in ((encoder.queries, theirs.encode_query), (encoder.passages, theirs.encode_document)):
            with torch.no_grad():
                ours = scorer.eval().embed(tokens(TEXTS))[:, :dim]
            norm = dim is not None and scorer.unit
            expected = said(TEXTS, convert_to_tensor=True, normalize_embeddings=norm)
            torch.testing.assert_close(normalize(ours, dim=-1) if norm else ours, expected, atol=2e-5, rtol=0)
    assert ours.shape[1] == (8 if dim else scorer.vector_width)
