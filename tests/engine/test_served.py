"""A served teacher: the model's own numbers through every interface, from a server that misbehaves, asked once for each text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from lead_ds.config import TeacherConfig, load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_run, write_run
from lead_ds.data.groups.open import open_groups
from lead_ds.engine.distributed.ranks import free_port
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError, RunError
from lead_ds.models.load import load_encoder, load_scorer, load_teacher, load_text
from lead_ds.models.reference import TEXTS as TEXTS_OF_MODELS
from lead_ds.teachers.served import ServedLookup, ServedSettings
from lead_ds.teachers.served_ahead import ask_ahead
from lead_ds.teachers.served_order import open_served
from tests.cli.test_bad_input import lead_ds
from tests.helpers.launch import launch
from tests.helpers.rooms import save_bert, settings
from tests.helpers.server import ModelServer, questions, serving

SECRET = "sk-never-to-be-seen"
TEXTS = [(f"text {i}",) for i in range(10)]


def plain(texts: list[str]) -> list[list[float]]:
    """Vectors that are known without a model."""
    return [[float(len(text)), float(sum(map(ord, text)) % 97), 1.0, 0.5] for text in texts]


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serving(plain) as one:
        yield one


def served(server: ModelServer, folder: Path, **more: Any) -> ServedLookup:
    """A lookup, ready to ask."""
    given = {"url": server.url(), "api": "embeddings", "model": "tiny", "pause": 0.01, "tries": 3, "request_size": 4}
    lookup = ServedLookup(ServedSettings(kind="served", answers=str(folder), **(given | more)))
    lookup.answers.begin()
    return lookup


def test_what_went_wrong_is_asked_again(server: ModelServer, tmp_path: Path) -> None:
    for fault in ("500", "503", "429", "cut", "garbage", "count", "twice", "nan", "width", "slow"):
        lookup = served(server, tmp_path / fault, timeout=0.5, request_size=10)
        server.faults, before = [fault, fault], len(server.asked)
        begun = time.monotonic()
        found = lookup.asked(TEXTS)
        assert len(server.asked) == before + 3, fault
        assert fault != "429" or time.monotonic() - begun > 0.8, "Retry-After is honoured"
        assert [found[text].tolist() for text in TEXTS] == plain([text for (text,) in TEXTS]), fault


def test_every_answer_is_kept_and_nothing_is_asked_twice(server: ModelServer, tmp_path: Path) -> None:
    lookup = served(server, tmp_path / "answers", concurrent=1, request_size=2)
    server.always, server.good = "500", 3
    with pytest.raises(RunError, match="no good answer in 3 tries: status 500"):
        lookup.asked(TEXTS)
    assert len(lookup.answers) == 6
    server.always = ""
    server.asked.clear()
    server.faults = ["slow"] * 4
    again = served(server, tmp_path / "answers", request_size=1)  # as a run that was killed and started again
    again.asked([*TEXTS, TEXTS[0]])
    assert sorted(server.texts) == [text for (text,) in TEXTS[6:]]
    assert server.busiest > 1
    again.asked(TEXTS)
    assert len(server.asked) == 4
    server.faults = ["wider"]
    with pytest.raises(RunError, match="gives vectors 5 wide, and gave 4 before"):
        again.asked([("new",)])
    with pytest.raises(InputError, match="holds answers of another model"):
        served(server, tmp_path / "answers", model="other")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ('{"data": [{"index": 0, "embedding": [1, null]}]}', "numbers that are not finite"),
        ('{"data": [{"index": 0, "embedding": [1' + "0" * 400 + "]}]}", "OverflowError"),
        ('{"data": [{"index": 0, "embedding": "AAAA"}]}', "buffer size must be a multiple"),
        ('{"data": [{"index": 0, "embedding": "no numbers"}]}', "an answer of"),
        ('{"data": [{"index": 0, "embedding": [[1], [2]]}]}', "shape"),
        ('{"data": [{"index": 0, "embedding": []}]}', "shape"),
        ('{"data": [{"index": "0", "embedding": [1]}]}', "index '0' of 1"),
        ('{"data": [{"embedding": [1]}]}', "KeyError 'index'"),
        ('{"data": {"index": 0}}', "another form: TypeError"),
        ('{"error": {"message": "the model is loading"}}', "the model is loading"),
        ("[" * 100_000, "not JSON"),
        ("null", "another form: TypeError"),
        ("", "not JSON"),
    ],
)
def test_an_answer_of_another_form_is_named(server: ModelServer, tmp_path: Path, body: str, what: str) -> None:
    lookup = served(server, tmp_path, tries=2)
    server.always, server.good = f"body:{body}", 0
    with pytest.raises(RunError, match=f"no good answer in 2 tries: .*{what}") as caught:
        lookup.asked([("one",)])
    assert len(str(caught.value)) < 500
    assert len(lookup.answers) == 0


def test_vectors_as_text_and_text_of_any_kind(server: ModelServer, tmp_path: Path) -> None:
    lookup = served(server, tmp_path)
    texts = [(text,) for text in (*TEXTS_OF_MODELS, "half a character: \ud83e", "a\0b", "\u2028", "e\u0301", "\u00e9")]
    server.always, server.good = "base64", 0
    found = lookup.asked(texts)
    assert [found[text].tolist() for text in texts] == plain([text for (text,) in texts])
    assert len(lookup.answers) == len(texts), "texts that look alike are two"
    before = len(server.asked)
    again = served(server, tmp_path).asked(texts)
    assert len(server.asked) == before
    assert all(np.array_equal(again[text], found[text]) for text in texts)


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_a_key_goes_nowhere_else(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("LEAD_TEST_KEY", SECRET)
    with serving(plain) as other:
        server.always, server.good, server.elsewhere = status, 0, other.url()
        lookup = served(server, tmp_path, key_variable="LEAD_TEST_KEY")
        with pytest.raises(InputError, match=f"status {status}: {other.url()} .*it is not followed"):
            lookup.asked(TEXTS)
        assert not other.headers


@pytest.mark.parametrize("key", ["sk-\u043a\u043b\u044e\u0447", "sk-two\nlines", 'sk-"quoted"/and\\more+'])
def test_a_key_that_is_odd_is_told_to_nobody(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("LEAD_TEST_KEY", key)
    lookup = served(server, tmp_path, key_variable="LEAD_TEST_KEY", tries=2)
    if key.isascii() and key.isprintable():
        padding = "x" * 190  # so that a message cut to its length would end within the key
        for form in (key, json.dumps(key), quote(key, safe="")):
            server.faults = [f"body:{json.dumps({'error': padding + form})}"] * 9
            with pytest.raises(RunError) as caught:
                lookup.asked(TEXTS)
            assert "sk-" not in str(caught.value)
    else:
        with pytest.raises(InputError, match="LEAD_TEST_KEY holds what no header can carry") as refused:
            lookup.asked(TEXTS)
        assert "sk-" not in str(refused.value)


@pytest.mark.parametrize("api", ["tei", "cohere", "jina", "vllm"])
def test_scores_through_every_interface(server: ModelServer, tmp_path: Path, api: str) -> None:
    lookup = served(server, tmp_path, url=server.url(f"/{api}"), api=api, model=None if api == "tei" else "tiny")
    pairs = [(query, passage) for query in ("one", "another") for passage in ("a", "bcd", "ef")]
    found = lookup.asked(pairs)
    for query, passage in pairs:
        one, other = plain([query, passage])
        np.testing.assert_allclose(found[query, passage], [np.dot(one, other)], rtol=1e-6)
    assert len(server.asked) == 2, "the passages of a query together"


def test_a_key_is_nowhere_but_in_the_request(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lookup = served(server, tmp_path / "answers", key_variable="LEAD_TEST_KEY")
    with pytest.raises(InputError, match="LEAD_TEST_KEY is not set"):
        lookup.asked(TEXTS)
    monkeypatch.setenv("LEAD_TEST_KEY", SECRET)
    seen = []
    for status, what in (("401", "check the key"), ("404", "the whole address"), ("413", "request_size")):
        server.faults = [status] * 9
        with pytest.raises(InputError, match=what) as caught:
            lookup.asked(TEXTS)
        assert f"status {status} for Bearer ***" in caught.value.what
        seen.append(str(caught.value))
    server.faults = []
    lookup.asked(TEXTS)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    seen += [*capfd.readouterr(), lookup.settings.model_dump_json(), str(lookup.answers.facts), repr(lookup)]
    assert not any(SECRET in text for text in seen)
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"url": "localhost:80"}, "is not an address"),
        ({"url": "http://me:secret@host/v1"}, "holds a key"),
        ({"url": "http://host/v1?api_key=x"}, "holds a key"),
        ({"url": "http://host/v1#token=x"}, "holds a key"),
        ({"key_variable": "sk-0"}, "is no name of a variable"),
        ({"extra": {"api_key": "x"}}, "looks like a key"),
        ({"extra": {"more": [{"Authorization": "x"}]}}, "looks like a key"),
        ({"extra": {"output_dtype": "ubinary"}}, "vectors are read as floats"),
        ({"model": None}, "model is missing"),
        ({"api": "tei"}, "model is ignored by tei"),
        ({"api": "jina", "scale": "cosine"}, "is of vectors"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, Any], what: str) -> None:
    given = {"kind": "served", "url": "http://host/v1", "api": "embeddings", "model": "m"}
    with pytest.raises(ValidationError, match=what):
        ServedSettings(**(given | change))


@pytest.mark.parametrize("setting", ["url=http://me:{}@host/v1", "url=http://host/v1?api_key={}", "key_variable={}"])
def test_a_key_in_the_wrong_place_is_not_repeated(setting: str) -> None:
    with pytest.raises(InputError, match="name the variable that holds the key in key_variable") as caught:
        open_served("http://host/v1", ["api=tei", setting.format(SECRET)])
    assert SECRET not in str(caught.value)


def test_nobody_answers(tmp_path: Path) -> None:
    with serving(plain) as server:
        gone = served(server, tmp_path, tries=2)
    with pytest.raises(RunError, match="no good answer in 2 tries: ConnectError"):
        gone.asked(TEXTS)


def test_a_run_gives_the_losses_of_the_model_that_is_served(rooms: Path, tmp_path: Path) -> None:
    """Of its vectors, compared over the batch; from the kept answers where it is repeated."""
    losses = {"layer": {"weight": 0.0}, "response": {"weight": 1.0}, "embedding": {"weight": 0.0}}
    own = settings(rooms, tmp_path / "own", losses=losses)
    config = TeacherConfig(**own["teacher"])
    scorer, text = load_teacher(config, torch.float32), load_text(config)

    def vectors(texts: list[str]) -> list[list[float]]:
        rows = []
        for one in texts:
            side = text.queries if one.startswith("Q: ") else text.passages
            with torch.no_grad():
                rows += scorer.embed(side([one.removeprefix("Q: ")])).tolist()
        return rows

    with serving(vectors) as server:
        teacher = {"kind": "served", "api": "embeddings", "url": server.url(), "model": "llama", "query_prompt": "Q: "}
        teacher |= {"scale": "cosine", "answers": str(tmp_path / "answers"), "pause": 0.01, "tries": 3}
        trees = [own, *({**own, "teacher": teacher, "output": str(tmp_path / name)} for name in ("served", "again"))]
        server.faults = ["500", "cut"]
        paths = [write(tmp_path / f"{i}.yaml", tree) for i, tree in enumerate(trees)]
        [[first, second, third]] = launch("tests.engine.jobs:distil_each", 1, configs=paths)
        spoiled = sum(len(body["input"]) for body in server.asked[:2])
        assert len(server.texts) == len(set(server.texts)) + spoiled, "nothing is asked twice, by another run neither"
    np.testing.assert_allclose(second, first, rtol=1e-5)
    assert third == second
    trees[2]["teacher"]["url"] = "http://127.0.0.1:1/v1/embeddings"  # where another model may answer
    paths = [write(tmp_path / "2.yaml", trees[2])]
    [[told]] = launch("tests.engine.jobs:distil_each", 1, configs=paths, resume=True)
    assert "have changed: address: teacher (" in told


def test_teach_asks_for_everything_before(rooms: Path, tmp_path: Path, server: ModelServer) -> None:
    teacher = {"kind": "served", "api": "tei", "url": server.url("/tei"), "answers": str(tmp_path / "answers")}
    tree = {**settings(rooms, tmp_path / "run", losses={"layer": {"weight": 0.0}}), "teacher": teacher}
    config = load_config(write(tmp_path / "run.yaml", tree))
    groups = open_groups(config.data)
    count, folder = ask_ahead(config, quiet=True)
    assert (count, folder) == (sum(len(groups.pool(row).keys) for row in range(len(groups))), tmp_path / "answers")
    server.always, server.good = "500", 0
    lookup = ServedLookup(config.teacher)
    drawn = [groups.draw(row, 7, 3) for row in range(len(groups))]
    assert lookup.read(np.arange(len(groups)), drawn)["scores"].shape == (len(groups), 3)


def test_a_served_reranker_has_no_vectors(rooms: Path, tmp_path: Path, server: ModelServer) -> None:
    teacher = {"kind": "served", "api": "tei", "url": server.url("/tei"), "answers": str(tmp_path / "answers")}
    losses = {"layer": {"weight": 0.0}, "embedding": {"weight": 1.0}}
    tree = {**settings(rooms, tmp_path / "run", losses=losses), "teacher": teacher}
    with pytest.raises(InputError, match="tei serves scores, and a loss reads vectors"):
        distill(load_config(write(tmp_path / "run.yaml", tree)), quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.slow
def test_a_server_that_others_wrote(tmp_path: Path) -> None:
    """infinity_emb, in an environment of its own: its embeddings and its rerank are the models' own numbers."""
    program = os.environ.get("INFINITY_EMB") or shutil.which("infinity_emb")
    if program is None:
        pytest.skip("set INFINITY_EMB to the program infinity_emb of an environment with infinity-emb[torch,server]")
    save_bert(tmp_path / "dual", layers=2, width=16)
    save_bert(tmp_path / "cross", layers=2, width=16, head=True)
    for file in tmp_path.rglob("tokenizer_config.json"):  # as the older transformers that it needs names the class
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    port = free_port()
    command = [program, "v2", "--port", str(port), "--engine", "torch", "--device", "cpu", "--no-model-warmup"]
    command += ["--no-bettertransformer", "--no-compile", "--host", "127.0.0.1"]
    for name in ("dual", "cross"):
        command += ["--model-id", str(tmp_path / name), "--served-model-name", name]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    quiet.pop("PYTHONPATH", None)
    texts = [text for text in TEXTS_OF_MODELS if text.strip()][:8]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=quiet, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        given: dict[str, Any] = {"kind": "served", "tries": 9, "pause": 1.0, "timeout": 120}
        where = f"http://127.0.0.1:{port}"
        dual = ServedSettings(
            **given, api="embeddings", model="dual", url=f"{where}/embeddings", answers=str(tmp_path / "v")
        )
        cross = ServedSettings(
            **given,
            api="jina",
            model="cross",
            url=f"{where}/rerank",
            extra={"raw_scores": True},
            answers=str(tmp_path / "s"),
        )
        lookups = [ServedLookup(dual), ServedLookup(cross)]
        for lookup in lookups:
            lookup.answers.begin()
        vectors = lookups[0].asked([(text,) for text in texts])
        pairs = [(texts[0], text) for text in texts]
        scores = lookups[1].asked(pairs)
    finally:
        server.kill()
        server.wait()
    with torch.no_grad():
        scorer, encoder = load_encoder(str(tmp_path / "dual"), ["pooling=mean", "normalize=true"])
        np.testing.assert_allclose([vectors[(x,)] for x in texts], scorer.embed(encoder.passages(texts)), atol=2e-5)
        scorer, encoder = load_scorer(str(tmp_path / "cross"))
        expected = scorer(tokens=encoder.pairs(*map(list, zip(*pairs, strict=True))))
        np.testing.assert_allclose([scores[pair][0] for pair in pairs], expected, atol=2e-5)


@pytest.mark.parametrize("api", ["tei", "embeddings"])
def test_evaluate_orders_candidates(rooms: Path, tmp_path: Path, server: ModelServer, api: str) -> None:
    dataset = Dataset.open(rooms / "data")
    found = {"q40": {"p1": 1.0, "p2": 2.0, "p3": 0.5}, "q41": {"p4": 1.0}}
    write_run(tmp_path / "first.trec", found)
    url = server.url("/tei" if api == "tei" else "/v1/embeddings")
    arguments = ["evaluate", "--model", url, "--kind", "served", "--data", str(rooms / "data"), "--split", "test"]
    arguments += ["--run", str(tmp_path / "first.trec"), "--out", str(tmp_path / "out.trec")]
    arguments += [f"api={api}", f"answers={tmp_path / 'answers'}", *(["model=m"] if api == "embeddings" else [])]
    done = lead_ds(*arguments)
    assert done.returncode == 0, done.stderr
    said = read_run(tmp_path / "out.trec")
    [query] = plain(dataset.queries.texts(dataset.queries.rows(["q40"])))
    for passage, score in said["q40"].items():
        [vector] = plain(dataset.corpus.texts(dataset.corpus.rows([passage])))
        assert score == pytest.approx(np.dot(query, vector), rel=1e-5)


@pytest.mark.parametrize("api", ["embeddings", "tei", "vllm"])
def test_mine_chooses_by_a_served_models_scores(rooms: Path, tmp_path: Path, server: ModelServer, api: str) -> None:
    """A server that dies on the way: what it answered is not asked again."""
    dataset = Dataset.open(rooms / "data")
    url = server.url("/v1/embeddings" if api == "embeddings" else f"/{api}")
    arguments: list[Any] = ["mine", "--data", rooms / "data", "--out", tmp_path / "groups.jsonl", "--number", 3]
    arguments += ["--depth", 8, "--rescore", url]
    given = [f"api={api}", f"answers={tmp_path / 'answers'}", "tries=2", "pause=0.01", "concurrent=1"]
    given += [] if api == "tei" else ["model=m"]
    arguments += [word for setting in given for word in ("--rescore-set", setting)]
    server.always, server.good = "500", 2
    dead = lead_ds(*arguments)
    assert dead.returncode == 1
    assert "no good answer in 2 tries: status 500" in dead.stderr
    begun = len(server.asked)  # two of which were answered
    server.always = ""
    done = lead_ds(*arguments)
    assert done.returncode == 0, done.stderr
    assert not questions(server.asked[:2]) & questions(server.asked[begun:])
    before = len(server.asked)
    assert lead_ds(*arguments, "--rescore-set", "kind=served").returncode == 0
    assert len(server.asked) == before, "a rerun asks nothing"
    groups = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert any(len(group["negatives"]) == 3 for group in groups)
    for group in groups[:9]:
        [query] = plain(dataset.queries.texts(dataset.queries.rows([group["query_id"]])))
        for name, score in group["scores"].items():
            [vector] = plain(dataset.corpus.texts(dataset.corpus.rows([name])))
            assert score == pytest.approx(np.dot(query, vector), rel=1e-5)
