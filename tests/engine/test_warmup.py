"""Warm-up: every family learns from labels alone, on any number of processes, and comes back as teacher and as student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lead_ds.config import StudentConfig, TeacherConfig, load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_run, write_run
from lead_ds.engine.training.warmup import load_warmup, warmup_config
from lead_ds.errors import InputError
from lead_ds.models.load import load_student, load_teacher, load_text
from lead_ds.retrieval.evaluate import Task, evaluate_path
from lead_ds.retrieval.rerank import Reranker, evaluate_reranked, score_pairs
from tests.helpers.launch import launch
from tests.helpers.rooms import settings
from tests.helpers.tiny import write_jsonl

JOB = "tests.engine.jobs:warm_each"
PASSAGES = 60
# With any tokenizer: at 3e-3 a cross-encoder, at 5e-3 a ColBERT now and then leaps and does not come back.
STEADY_LR = 1e-3
MEASURES = ["nDCG@10", "RR@10"]

# name -> the section to train, and how the configuration differs from `settings`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dual": ("student", {"losses": {"contrastive": {"temperature": 0.1}}}),
    "dual teacher": ("teacher", {"teacher": "dual_encoder", "losses": {"contrastive": {"temperature": 0.1}}}),
    "colbert": (
        "teacher",
        {
            "teacher": "colbert",
            "losses": {"contrastive": {"temperature": 0.2}},
            "extra_teacher": {
                "token_dim": 12,
                "lr": STEADY_LR,
                "query_expansion": True,
                "mask_punctuation": True,
                "query_length": 20,
                "query_prompt": "which ",
            },
        },
    ),
    # A model without a scoring head, and a learning rate of its own.
    "cross": (
        "teacher",
        {"teacher": "cross_encoder", "extra_teacher": {"path": "bert", "lr": STEADY_LR, "passage_prompt": "text: "}},
    ),
    "decoder": ("student", {"student": {"kind": "cross_encoder", "path": "llama", "max_length": 64}}),
}
ALIKE = ("dual", "colbert", "cross")  # compared on one process and two
# What is told instead.
REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "decoder reranker": ("teacher", {"teacher": "llm_reranker"}, ["teacher.kind", "llm_reranker", "cross_encoder"]),
    "cached": ("teacher", {"extra_teacher": {"kind": "cached"}}, ["teacher.kind", "cached"]),
    "no such section": ("both", {}, ["--of", "'both'", "student or teacher"]),
    "nothing to compare": ("teacher", {"teacher": "cross_encoder", "data": {"negatives": 0}}, ["data.negatives: is 0"]),
    "run of other queries": ("student", {"student": {"kind": "colbert"}}, ["other.trec", "judged queries"]),
}


def asked_again(rooms: Path, folder: Path) -> Path:
    """The collection of `rooms`, and six of its passages asked for in seven ways: five to train on, two held out."""
    passages = [json.loads(line) for line in (rooms / "data" / "corpus.jsonl").read_text().splitlines()]
    write_jsonl(folder / "corpus.jsonl", passages)
    texts = [row["text"].split(". ")[0] for row in passages]
    ways = ("which thing {}", "what is it that {}", "{} at night", "people of {}", "in summer {}", "{}", "tell of {}")
    wanted = range(0, PASSAGES, 10)
    queries = [(f"q{row}_{i}", f"p{row}", way.format(texts[row])) for i, way in enumerate(ways) for row in wanted]
    write_jsonl(folder / "queries.jsonl", [{"_id": name, "text": text} for name, _, text in queries])
    others = [f"p{row}" for row in range(PASSAGES) if row not in wanted]
    train = [{"query_id": name, "positives": [row], "negatives": others} for name, row, _ in queries[:30]]
    write_jsonl(folder / "train.jsonl", train)
    (folder / "qrels").mkdir()
    lines = [f"{name}\t{row}\t1\n" for name, row, _ in queries[30:]]
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def root(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, and runs to rerank."""
    root = tmp_path_factory.mktemp("warmup")
    dataset = Dataset.open(asked_again(rooms, root / "data"))
    everything = {query: {f"p{i}": 1.0 for i in range(PASSAGES)} for query in dataset.qrels("dev")}
    write_run(root / "all.trec", everything)
    write_run(root / "other.trec", {"elsewhere": {"p1": 1.0}})
    return root


def write(root: Path, rooms: Path, name: str, steps: int, sections: dict[str, Any], **train: Any) -> str:
    """The path of a configuration whose candidates are the whole collection."""
    run = "other.trec" if name == "run of other queries" else "all.trec"
    evaluation = {"split": "dev", "metric": "RR@10", "measures": MEASURES, "run": str(root / run), "depth": PASSAGES}
    kinds = {sections.get("student", {}).get("kind", "dual_encoder"), sections.get("teacher", "dual_encoder")}
    if kinds == {"dual_encoder"}:  # which search the whole collection
        evaluation = {name: value for name, value in evaluation.items() if name not in ("run", "depth")}
    more = {
        "steps": steps,
        "save_every": steps,
        "lr": 3e-3,
        "batch_size": 8,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    tree = settings(
        rooms,
        root / name,
        **{"evaluation": evaluation, **sections, "train": {**more, **sections.get("train", {}), **train}},
    )
    tree["data"]["path"] = str(root / "data")
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture(scope="module")
def warmed(rooms: Path, root: Path) -> dict[str, Any]:
    """Of each case the losses, or what was told."""
    cases = [(write(root, rooms, name, 40, sections, evaluate_every=20), of) for name, (of, sections) in CASES.items()]
    cases += [(write(root, rooms, name, 1, sections), of) for name, (of, sections, _) in REFUSED.items()]
    cases += [(write(root, rooms, f"{name} 1", 6, alike(name)), CASES[name][0]) for name in ALIKE]
    [results] = launch(JOB, 1, cases=cases)
    return dict(zip((*CASES, *REFUSED, *(f"{name} 1" for name in ALIKE)), results, strict=True))


def alike(name: str) -> dict[str, Any]:
    """A case with a learning rate that does not blow up what rounding differs by."""
    sections = CASES[name][1]
    more: dict[str, Any] = {"extra_teacher": {**sections.get("extra_teacher", {}), "lr": 1e-4}, "train": {"lr": 1e-4}}
    return {**sections, **more}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_every_family_learns(warmed: dict[str, Any], root: Path, name: str) -> None:
    losses = warmed[name]
    assert len(losses) == 40, losses
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10]), losses
    assert {tuple(row["parts"]) for row in rows(root / name) if "parts" in row} == {("contrastive",)}
    # Held-out wordings over the whole collection. By chance: the positive's rank is uniform.
    best = max(row["evaluation"]["RR@10"] for row in rows(root / name) if "evaluation" in row)
    chance = sum(1 / rank for rank in range(1, 11)) / PASSAGES
    assert best > 3 * chance


@pytest.mark.parametrize("name", CASES)
def test_the_saved_model_is_the_best_one_and_ranks_as_it_did_in_training(
    warmed: dict[str, Any], root: Path, name: str
) -> None:
    best = json.loads((root / name / "checkpoints" / "best.json").read_text())["values"]
    model, data = root / name / "model", Dataset.open(root / "data")
    if name.startswith("dual"):
        found = evaluate_path(model, root / "data", "dev", MEASURES, quiet=True)
    else:
        saved, candidates = Reranker.open(model), read_run(root / "all.trec")
        found = evaluate_reranked(saved.scorer, saved.encoder, Task(data, "dev", MEASURES), candidates, quiet=True).mean
    assert found == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_it_loads_as_a_teacher_and_as_a_student(warmed: dict[str, Any], rooms: Path, root: Path, name: str) -> None:
    of, _ = CASES[name]
    given = load_config(root / f"{name}.yaml")
    section = given.student if of == "student" else given.teacher
    assert section is not None
    # Only where the model is changes; and another section of that kind need not repeat what the model's files tell.
    again = section.model_copy(update={"path": str(root / name / "model")})
    lengths = ("query_length", "passage_length", "max_length")
    told = {name: value for name, value in again.model_dump().items() if name in ("path", "kind", *lengths)}
    models = [again, StudentConfig.model_validate(told), TeacherConfig.model_validate(told)]
    queries = ["which thing has three hearts", "what feeds rivers in summer?"]
    passages = ["The octopus has three hearts, and blue blood.", "A glacier feeds rivers. Bread rises because of gas."]
    pairs = np.array([[q, p] for q in range(2) for p in range(2)])
    scores = []
    for config in models:
        load = load_teacher if isinstance(config, TeacherConfig) else load_student
        scorer, encoder = load(config, torch.float32).eval(), load_text(config)  # type: ignore[arg-type]
        asked, read = (lambda rows, texts=texts: [texts[row] for row in rows] for texts in (queries, passages))
        scores.append(score_pairs(scorer, encoder, asked, read, pairs))
    assert len(set(scores[0].tolist())) == 4
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-5, atol=1e-5)


def test_a_teacher_brings_its_own_settings(warmed: dict[str, Any], root: Path) -> None:
    run = load_config(root / "colbert" / "config.yaml")
    assert (run.teacher, run.student.kind, run.student.token_dim, run.train.lr) == (
        None,
        "colbert",
        12,
        STEADY_LR,
    )
    assert run.student.normalize is True  # it will be read by cosines
    assert rows(root / "colbert")[0]["lr"] == pytest.approx(STEADY_LR)
    assert load_config(root / "cross" / "config.yaml").student.max_length == 64


def test_cards_tell_the_truth(warmed: dict[str, Any], root: Path) -> None:
    cards = {name: (root / name / "model" / "README.md").read_text() for name in CASES}
    assert all("trained on labels" in card and "istilled" not in card for card in cards.values())
    assert "among every passage of the batch, at temperature 0.1" in cards["dual"]
    assert "SentenceTransformer(" in cards["dual"]
    assert "MaxSim" in cards["colbert"]
    assert "SentenceTransformer(" not in cards["colbert"] + cards["cross"]
    assert "among its own passages" in cards["cross"]
    assert "`all.trec`, ranked again" in cards["cross"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_warmed_up_is_told_and_nothing_written(warmed: dict[str, Any], root: Path, name: str) -> None:
    for words in REFUSED[name][2]:
        assert words in warmed[name], warmed[name]
    assert not (root / name).exists()


def test_no_teacher_section(rooms: Path, root: Path) -> None:
    config = load_config(write(root, rooms, "alone", 1, {})).model_copy(update={"teacher": None})
    with pytest.raises(InputError, match=r"teacher: is missing .*--of student"):
        warmup_config(config, "teacher")
    warm = {"losses": {"contrastive": {"temperature": 0.05, "teacher_temperature": 2.0}}}
    both = load_config(write(root, rooms, "both", 1, warm))
    assert warmup_config(both, "teacher").losses.contrastive.temperature == 2.0
    assert warmup_config(both, "student").losses.contrastive.temperature == 0.05
    silent = {"losses": {"contrastive": {"weight": 0.0}}}
    losses = warmup_config(load_config(write(root, rooms, "silent", 1, silent))).losses
    assert losses.contrastive.weight == 1.0  # a configuration that distils without labels
    assert not losses.needs_teacher


def test_a_file_without_a_teacher_need_not_switch_off_what_reads_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "student: {path: bert}\ndata: {path: data}\nlosses: {layer: {k: 2}, contrastive: {temperature: 0.1}}\n"
    )
    with pytest.raises(InputError, match="a teacher section is missing"):
        load_config(path)
    losses = warmup_config(load_warmup(path, ["losses.response.weight=2"])).losses
    assert (losses.needs_teacher, losses.contrastive.weight, losses.contrastive.temperature) == (False, 1.0, 0.1)
    with pytest.raises(InputError, match=r"losses.layer.k"):
        load_warmup(path, ["losses.layer.k=-1"])
    with pytest.raises(InputError, match=r"run.yaml: losses"):
        load_warmup(path, ["losses=1"])


def test_two_processes_learn_what_one_learns(warmed: dict[str, Any], rooms: Path, root: Path) -> None:
    stage3 = {"deepspeed": {"student": "ds_configs/student_zero3.json"}}
    cases = [
        (write(root, rooms, f"{name} 2", 6, {**alike(name), **stage3}, batch_size=4), CASES[name][0]) for name in ALIKE
    ]
    both = launch(JOB, 2, cases=cases)
    assert both[0] == both[1]
    for name, losses in zip(ALIKE, both[0], strict=True):
        np.testing.assert_allclose(losses, warmed[f"{name} 1"], rtol=1e-5, err_msg=name)
        [one], [two] = (
            [row["evaluation"] for row in rows(root / f"{name} {n}") if "evaluation" in row] for n in (1, 2)
        )
        assert two == pytest.approx(one, abs=1e-6), name
    # The new head is the same on every process: the first losses would differ otherwise.
    weights = load_file(root / "cross 2" / "model" / "model.safetensors")
    assert weights["classifier.weight"].shape == (1, 32)
