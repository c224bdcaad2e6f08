"""What is not finite is found where it is made, and named; what is written can be read."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lead_ds.cli.main import main
from lead_ds.config import Config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import write_run
from lead_ds.data.groups.open import open_groups
from lead_ds.errors import InputError, LeadError, RunError
from lead_ds.io.files import write_json
from lead_ds.models.export import export_sentence_transformers
from lead_ds.models.inspection import inspect_model
from lead_ds.retrieval.encode import encode_to
from lead_ds.retrieval.encoded import make_run
from lead_ds.retrieval.evaluate import Task, evaluate_model, open_encoder
from lead_ds.retrieval.index import build_index
from lead_ds.retrieval.rerank import Reranker, evaluate_reranked
from lead_ds.retrieval.vectors import Vectors
from lead_ds.settings.data import DataConfig
from lead_ds.settings.parse import parse_section
from lead_ds.teachers.fit_lens import Fit, fit_lens
from lead_ds.teachers.teach import teach
from tests.helpers.rooms import settings
from tests.helpers.tiny import write_jsonl


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """The tiny model with a row of its embedding matrix that is not a number."""
    return spoilt(model, tmp_path / "broken")


def spoilt(model: Path, folder: Path) -> Path:
    """A copy of a model that gives no number for a text with an octopus."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    ids = AutoTokenizer.from_pretrained(model)("octopus")["input_ids"]
    weights[name][ids[1]] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_vector_that_is_not_finite_names_its_text(broken: Path, data: Path, tmp_path: Path) -> None:
    scorer, encoder = open_encoder(str(broken), "cpu")
    dataset = Dataset.open(data)
    with pytest.raises(RunError, match=r"^(corpus|queries): the model's vector of text \d+ is not finite: '.*octopus"):
        evaluate_model(scorer, encoder, Task(dataset, "test"), quiet=True)
    with pytest.raises(RunError, match=r"is not finite: '.*octopus"):
        encode_to(tmp_path / "vectors", scorer.embed, encoder, dataset.corpus, {})
    with pytest.raises(LeadError, match=r"no such file|missing"):  # nothing that looks finished
        Vectors.open(tmp_path / "vectors")
    found = {query: dict.fromkeys(dataset.corpus.ids, 1.0) for query in list(dataset.qrels("test"))[:1]}
    reranker = Reranker(scorer, encoder)
    with pytest.raises(RunError, match=r"scores are not finite, first of query '.*' with passage '.*octopus"):
        evaluate_reranked(reranker.scorer, reranker.encoder, Task(dataset, "test"), found, quiet=True)


def test_a_weight_that_is_not_finite_is_named_by_inspect_and_export(broken: Path, tmp_path: Path) -> None:
    told = r"16 of 6400 numbers of its weight \S*word_embeddings\.weight are not finite, such as the row of token '.+' \(take"
    for command in (inspect_model, partial(export_sentence_transformers, out=tmp_path / "out")):
        with pytest.raises(InputError, match=told):
            command(str(broken))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dual_encoder", "colbert", "cross_encoder"])
def test_what_a_teacher_gives_that_is_not_finite_names_the_text(rooms: Path, tmp_path: Path, kind: str) -> None:
    tree = settings(rooms, tmp_path / "run", teacher=kind)
    good = rooms / ("cross" if kind == "cross_encoder" else "bert")
    tree["teacher"]["path"] = str(spoilt(good, tmp_path / "broken"))
    for work in (teach, partial(fit_lens, fit=Fit())):
        if kind != "colbert" or work is teach:
            with pytest.raises(
                RunError, match=r"broken: gives numbers that are not finite, as float32, for '.*octopus"
            ):
                work(parse_section(Config, tree, "x.yaml"), out=tmp_path / "out", quiet=True)


def test_vectors_of_another_hand_are_checked_before_they_are_indexed(model: Path, data: Path, tmp_path: Path) -> None:
    scorer, encoder = open_encoder(str(model), "cpu")
    vectors = encode_to(tmp_path / "vectors", scorer.embed, encoder, Dataset.open(data).corpus, {})
    array = np.array(vectors.block(0))
    array[7, 3] = np.inf
    np.save(vectors.path(0), array)
    record = tmp_path / "vectors" / "manifest.json"
    with pytest.raises(InputError, match=r"vectors-00000\.npy: is not as it was written"):
        Vectors.open(record.parent)
    record.write_text(
        json.dumps({name: x for name, x in json.loads(record.read_text()).items() if name != "checksums"})
    )
    with pytest.raises(InputError, match="holds a vector that is not finite"):
        build_index(Vectors.open(tmp_path / "vectors"), tmp_path / "index", quiet=True)


def test_a_reranker_that_is_not_finite_is_told_as_such(rooms: Path, tmp_path: Path) -> None:
    shutil.copytree(rooms / "cross", tmp_path / "cross")
    weights = load_file(tmp_path / "cross" / "model.safetensors")
    weights["classifier.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "cross" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 of 32 numbers of its weight classifier\.weight are not finite"):
        Reranker.open(str(tmp_path / "cross"))


def test_scores_that_are_not_finite_make_no_run() -> None:
    with pytest.raises(RunError, match="the score of passage 'b' for query 'q' is not finite"):
        make_run(["q"], [[1.0, math.nan]], [[0, 1]], ["a", "b"])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_no_run_and_no_json_is_written_that_is_refused_when_read(tmp_path: Path, score: float) -> None:
    with pytest.raises(InputError, match="'a' for query 'q' is not finite"):
        write_run(tmp_path / "run", {"q": {"b": 1.0, "a": score}})
    with pytest.raises(RunError, match=r"mean\.1\.x is not finite"):
        write_json(tmp_path / "x.json", {"mean": [1.0, {"x": score}]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("score", ["1e39", "-1e300", "NaN", "Infinity"])
def test_scores_of_groups_fit_their_type(data: Path, tmp_path: Path, score: str) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        shutil.copy(data / name, tmp_path / name)
    line = '{"query_id": "q1", "positives": ["p1"], "negatives": [], "scores": {"p1": SCORE}}\n'
    (tmp_path / "train.jsonl").write_text(line.replace("SCORE", "1") + line.replace("SCORE", score))
    with pytest.raises(InputError, match=r"train\.jsonl:2: "):
        open_groups(DataConfig(path=str(tmp_path)))
    (tmp_path / "train.jsonl").write_text(
        f'{{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [{score}], "neg_scores": [1]}}\n'
    )
    with pytest.raises(InputError, match=r"train\.jsonl:1: "):
        open_groups(DataConfig(path=str(tmp_path), negatives=1))


@pytest.mark.parametrize("name", ["a b", "a\u3000b", "\u2028", "a\x1cb", "a\0b", ""])
def test_ids_and_tags_that_a_run_cannot_hold(tmp_path: Path, name: str) -> None:
    for run in ({name: {"a": 1.0}}, {"q": {name: 1.0}}):
        with pytest.raises(InputError, match="holds white space, a NUL, or nothing"):
            write_run(tmp_path / "run", run)
    with pytest.raises(InputError, match="holds white space, a NUL, or nothing"):
        write_run(tmp_path / "run", {"q": {"a": 1.0}}, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["corpus.jsonl", "queries.jsonl", "--tag"])
def test_they_are_found_before_the_work(
    data: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    tag = "my run" if where == "--tag" else "run"
    if where != "--tag":
        records = [json.loads(line) for line in (folder / where).read_text().splitlines()]
        write_jsonl(folder / where, [*records, {"_id": "a\u3000b", "title": "", "text": "x"}])
    command = ["search", "--model", str(tmp_path / "no-model"), "--data", str(folder), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--tag", tag])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert where in told
    assert "white space" in told  # and not that there is no such model
