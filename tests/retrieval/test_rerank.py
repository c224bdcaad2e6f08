"""Reranking: what a model of any kind says of candidates, against one pair at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.cli.main import main
from lead_ds.config import StudentConfig
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run, read_run, write_run
from lead_ds.errors import InputError, RunError
from lead_ds.models.load import kind_of, load_scorer, load_student
from lead_ds.retrieval.evaluate import Task
from lead_ds.retrieval.metrics import score_run
from lead_ds.retrieval.mine import bm25_run
from lead_ds.retrieval.rerank import Reranker, evaluate_reranked, find_candidates, rerank
from tests.cli.test_bad_input import lead_ds
from tests.helpers.launch import launch

MEASURES = ["nDCG@10", "RR@10", "R@5", "AP@1000"]
# kind -> model of `rooms`, settings.
MODELS: dict[str, tuple[str, list[str]]] = {
    "dual_encoder": ("llama", ["normalize=true"]),
    "colbert": ("bert", ["query_expansion=true", "mask_punctuation=true", "query_length=20", "scale=cosine"]),
    "cross_encoder": ("cross", ["max_length=64", 'query_prompt="q: "']),
    "llm_reranker": ("reranker", ["max_length=200", "yes_token=e", "no_token=o", 'template="{query} {passage} is it"']),
}


@pytest.fixture(scope="module")
def dataset(rooms: Path) -> Dataset:
    return Dataset.open(rooms / "data")


@pytest.fixture(scope="module")
def candidates(dataset: Dataset) -> Run:
    """Ten to twenty passages of every test query but one, the positive among them."""
    draw = random.Random(0)
    qrels = dataset.qrels("test")
    found = {}
    for query, judged in list(qrels.items())[1:]:
        others = draw.sample([name for name in dataset.corpus.ids if name not in judged], draw.randrange(9, 20))
        found[query] = {name: draw.random() for name in [*others, *judged]}
    return found


def opened(rooms: Path, kind: str) -> Reranker:
    path, settings = MODELS[kind]
    return Reranker.open(rooms / path, kind, settings, "cpu")


def one_by_one(model: Reranker, dataset: Dataset, candidates: Run) -> Run:
    """Every pair alone, without padding."""
    scorer, encoder, run = model.scorer, model.encoder, {}
    for query, found in candidates.items():
        asked = dataset.queries.text(dataset.queries.row(query))
        run[query] = {
            name: alone(scorer, encoder, asked, dataset.corpus.text(dataset.corpus.row(name))) for name in found
        }
    return run


@torch.no_grad()
def alone(scorer: Any, encoder: Any, query: str, passage: str) -> float:
    if scorer.scope == "group":
        return scorer(tokens=encoder.pairs([query], [passage])).item()
    asked, read = encoder.queries([query]), encoder.passages([passage])
    q, p = scorer(tokens=asked)[0].double(), scorer(tokens=read)[0].double()
    if scorer.gives_vectors:
        return (q @ p).item()
    q, p = (torch.nn.functional.normalize(x, dim=-1) for x in (q, p))
    q, p = q[asked["score_mask"][0].bool()], p[read["score_mask"][0].bool()]
    return (q @ p.T).max(1).values.sum().item()


@pytest.mark.parametrize("kind", MODELS)
def test_equals_every_pair_alone(rooms: Path, dataset: Dataset, candidates: Run, kind: str) -> None:
    model = opened(rooms, kind)
    expected = one_by_one(model, dataset, candidates)
    found = rerank(model.scorer, model.encoder, dataset, candidates, batch_size=7, quiet=True)
    assert list(found) == list(candidates)
    for query, scores in found.items():
        assert scores == pytest.approx(expected[query], rel=1e-4, abs=1e-4)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    qrels = dataset.qrels("test")
    means = evaluate_reranked(model.scorer, model.encoder, Task(dataset, "test", MEASURES), candidates, quiet=True).mean
    assert means == pytest.approx(score_run(expected, qrels, MEASURES).mean, abs=1e-6)
    assert means["R@5"] < 1  # the query without candidates counts


@pytest.mark.parametrize("kind", MODELS)
def test_scores_of_plain_texts(rooms: Path, kind: str) -> None:
    model = opened(rooms, kind)
    query, passages = (
        "which thing has three hearts",
        ["The octopus has three hearts.", "bread", "An owl swallows mice."],
    )
    expected = [alone(model.scorer, model.encoder, query, passage) for passage in passages]
    assert model.scores(query, passages) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert model.scores(query, []) == []


def test_two_processes_give_what_one_gives(rooms: Path, dataset: Dataset, candidates: Run, tmp_path: Path) -> None:
    write_run(tmp_path / "all.trec", candidates)
    [query] = list(candidates)[:1]
    write_run(tmp_path / "one.trec", {query: {"p0": 1.0}})  # less than there are processes
    models = [[kind, str(rooms / path), *settings] for kind, (path, settings) in MODELS.items()]
    runs = [str(tmp_path / "all.trec"), str(tmp_path / "one.trec")]
    results = launch(
        "tests.retrieval.jobs:rerank_each", 2, models=models, data=str(rooms / "data"), runs=runs, batch_size=7
    )
    for place, result in enumerate(results[0]):
        model = opened(rooms, list(MODELS)[place // 2])
        expected = rerank(model.scorer, model.encoder, dataset, read_run(runs[place % 2]), quiet=True)
        assert {name: list(found) for name, found in result["run"].items()} == {n: list(f) for n, f in expected.items()}
        for name, found in result["run"].items():
            assert found == pytest.approx(expected[name], rel=1e-4, abs=1e-4)
    assert results[1] == results[0]  # the forwards, too: a sharded model needs everyone
    assert all(result["forwards"] > 0 for result in results[0])


def test_the_model_stays_in_training_mode(rooms: Path, dataset: Dataset, candidates: Run) -> None:
    config = StudentConfig(kind="colbert", path=str(rooms / "dropout"))
    scorer, encoder = load_student(config, torch.float32), opened(rooms, "colbert").encoder
    first = rerank(scorer, encoder, dataset, candidates, quiet=True)
    assert scorer.training
    assert first == rerank(scorer, encoder, dataset, candidates, quiet=True)


def test_scores_that_are_not_finite(rooms: Path, dataset: Dataset, candidates: Run) -> None:
    model = opened(rooms, "cross_encoder")
    with torch.no_grad():
        model.scorer.model.classifier.bias.fill_(float("inf"))
    with pytest.raises(RunError, match=r"cross: \d+ of \d+ scores are not finite"):
        rerank(model.scorer, model.encoder, dataset, candidates, quiet=True)


def test_candidates_of_a_run(dataset: Dataset, candidates: Run, tmp_path: Path) -> None:
    queries = list(dataset.qrels("test"))
    write_run(tmp_path / "run.trec", {**candidates, "another": {"p1": 1.0}})
    found = find_candidates(dataset, queries, 3, tmp_path / "run.trec")
    assert set(found) == set(candidates)
    for query, passages in found.items():
        assert list(passages) == sorted(candidates[query], key=lambda name: -candidates[query][name])[:3]
    with pytest.raises(InputError, match=r"run.trec: has none of the 1 judged queries"):
        find_candidates(dataset, ["q0"], 3, tmp_path / "run.trec")
    write_run(tmp_path / "run.trec", {queries[0]: {"p1": 1.0, "p999": 2.0}})
    with pytest.raises(InputError, match="'p999'"):
        find_candidates(dataset, queries, 3, tmp_path / "run.trec")


def test_bm25s_candidates_are_found_once(dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    queries = list(dataset.qrels("test"))
    found = find_candidates(dataset, queries, 5, cache=tmp_path, quiet=True)
    assert found == bm25_run(dataset, queries, 5, quiet=True)
    [kept] = tmp_path.iterdir()
    write_run(kept, {queries[0]: {"p1": 1.0}})  # what is read again is the file
    assert find_candidates(dataset, queries, 5, cache=tmp_path, quiet=True) == {queries[0]: {"p1": 1.0}}
    for other in ((queries, 4), (queries[1:], 5)):
        assert find_candidates(dataset, *other, cache=tmp_path, quiet=True) == bm25_run(dataset, *other, quiet=True)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_directory_holds(rooms: Path, tmp_path: Path) -> None:
    assert kind_of(str(rooms / "cross")) == "cross_encoder"
    assert kind_of(str(rooms / "llama")) == "dual_encoder"
    (tmp_path / "lead_ds.json").write_text('{"kind": "colbert"}')
    (tmp_path / "config.json").write_text((rooms / "bert" / "config.json").read_text())
    assert kind_of(str(tmp_path)) == "colbert"
    with pytest.raises(InputError, match="holds a colbert"):
        load_scorer(str(tmp_path), "cross_encoder")


@pytest.mark.parametrize(
    ("model", "kind", "setting", "says"),
    [
        ("cross", None, "max_lenght=64", "max_lenght: unknown key (did you mean 'max_length'?)"),
        ("cross", None, "max_length=4000", "max_length is 4000, the model has 128 positions"),
        ("bert", "cross_encoder", "max_length=64", "without a trained scoring head"),
        ("reranker", "llm_reranker", "yes_token=octopus", "teacher.yes_token"),
        ("llama", None, "poling=mean", "poling: unknown key (did you mean 'pooling'?)"),
    ],
)
def test_wrong_settings(rooms: Path, model: str, kind: str | None, setting: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        load_scorer(str(rooms / model), kind, [setting])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --model with --data, or --run with --qrels"),
        (["--model", "m"], "--data: is needed"),
        (["--run", "r", "--depth", "3"], "--qrels: is needed"),
        (["--run", "r", "--qrels", "q", "--depth", "3"], "are of a model"),
        (["--model", "m", "--data", "d", "--qrels", "q"], "--qrels: goes with --run alone"),
        (["--model", "m", "--data", "d", "--kind", "bm25"], "--kind: 'bm25' is unknown"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert says in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""


def test_the_command_reranks_a_run_and_writes_one(
    rooms: Path, dataset: Dataset, candidates: Run, tmp_path: Path
) -> None:
    write_run(tmp_path / "first.trec", candidates)
    arguments = ["--model", str(rooms / "cross"), "--data", str(rooms / "data"), "--run", str(tmp_path / "first.trec")]
    out = str(tmp_path / "second.trec")
    done = lead_ds("evaluate", *arguments, "--depth", "8", "--out", out, "--json", "-", "max_length=64")
    assert done.returncode == 0, done.stderr
    told, second = json.loads(done.stdout)["mean"], read_run(out)
    model = Reranker.open(rooms / "cross", None, ["max_length=64"], "cpu")
    first = find_candidates(dataset, list(candidates), 8, tmp_path / "first.trec")
    expected = one_by_one(model, dataset, first)
    assert {query: set(found) for query, found in second.items()} == {
        query: set(found) for query, found in first.items()
    }
    for query, found in second.items():
        np.testing.assert_allclose(
            [expected[query][name] for name in found], list(found.values()), rtol=1e-4, atol=1e-4
        )
    assert told == pytest.approx(score_run(second, dataset.qrels("test"), list(told)).mean)
