"""How many tokens are read where nothing is set: as many as the reference library reads, whoever saved the model and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.errors import InputError
from lead_ds.models.as_read import check_room, reading_line, room
from lead_ds.models.load import load_encoder, load_scorer, load_student, load_teacher, load_text, with_lengths
from lead_ds.models.reference import compare
from lead_ds.models.student_dir import save_student
from tests.helpers.tiny import tiny_tokenizer
from tests.models.tiny_models import tiny_model

LONG = ["bread rises because yeast makes gas " * 60, "owl"]


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes one out."""
    tree = json.loads(file.read_text()) if file.exists() else {}
    tree = {key: value for key, value in (tree | changes).items() if value is not None}
    file.write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder of 130 positions as sentence-transformers 6 saves it, without max_seq_length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    root = tmp_path_factory.mktemp("lengths")
    path = tiny_model(root / "bert", "bert")
    modules = [Transformer(path), Pooling(32, "mean"), Normalize()]
    SentenceTransformer(modules=modules).save_pretrained(str(root / "saved"), create_model_card=False)
    return root / "saved"


def older(folder: Path) -> None:
    """Let the transformer and its files lie in a folder of their own, as sentence-transformers 2 had them."""
    inside = folder / "0_Transformer"
    inside.mkdir()
    for file in [*folder.glob("*token*"), folder / "config.json", folder / "model.safetensors"]:
        file.rename(inside / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").unlink(missing_ok=True)
    edit(inside / "sentence_bert_config.json", max_seq_length=24, do_lower_case=False)


@pytest.mark.parametrize(
    ("form", "length"),
    [("6", 130), ("named", 40), ("older", 24), ("no file", 130), ("tokenizer", 50), ("endless tokenizer", 130)],
)
def test_a_dual_encoder_is_read_as_far_as_the_reference_does(
    saved: Path, tmp_path: Path, form: str, length: int
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    config = folder / "sentence_bert_config.json"
    if form == "named":
        edit(config, max_seq_length=40)
    elif form == "older":
        older(folder)
    elif form == "no file":
        config.unlink(missing_ok=True)
    elif "tokenizer" in form:
        edit(folder / "tokenizer_config.json", model_max_length=50 if form == "tokenizer" else int(1e30))
    scorer, encoder = load_encoder(str(folder))
    assert (encoder.query_length, encoder.passage_length) == (length, length)
    assert compare(scorer, encoder, LONG)["difference"] < 2e-5
    teacher = load_text(TeacherConfig(kind="dual_encoder", path=str(folder)))
    assert [len(row) for row in teacher.rows(LONG, "passages")[0]] == [length, 3]


def test_a_model_of_pairs_is_read_as_far_as_the_reference_does(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, "bert", "classifier")
    scorer, encoder = load_scorer(path)
    assert encoder.max_length == 130
    assert compare(scorer, encoder, LONG)["difference"] < 2e-5
    edit(tmp_path / "tokenizer_config.json", model_max_length=60)
    scorer, encoder = load_scorer(path)
    assert encoder.max_length == 60
    assert compare(scorer, encoder, LONG)["difference"] < 2e-5


def test_what_nothing_limits_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", model_max_length=int(1e30))
    for kind, name in (("dual_encoder", "query_length"), ("cross_encoder", "max_length")):
        with pytest.raises(InputError, match=rf"nor its positions limit a text \(set {name}, to 512 say\)"):
            load_text(TeacherConfig(kind=kind, path=str(tmp_path)))
    lengths = {"query_length": 20, "passage_length": 700}
    assert load_text(StudentConfig(path=str(tmp_path), **lengths)).passage_length == 700


@pytest.mark.parametrize("kind", ["dual_encoder", "cross_encoder"])
def test_a_student_serves_the_lengths_that_it_was_trained_with(tmp_path: Path, kind: str) -> None:
    lengths = {"max_length": 60} if kind == "cross_encoder" else {"query_length": 20, "passage_length": 60}
    path = tiny_model(tmp_path / "base", "bert", "classifier" if kind == "cross_encoder" else "base")
    config = StudentConfig(kind=kind, path=path, **lengths)
    scorer = load_student(config, torch.float32).eval()
    save_student(scorer, load_text(config), tmp_path / "student")
    again, encoder = load_scorer(str(tmp_path / "student"))
    found = encoder.max_length if kind == "cross_encoder" else encoder.passage_length
    assert found == 60
    assert compare(again, encoder, LONG)["difference"] < 2e-5
    told = with_lengths(StudentConfig(kind=kind, path=str(tmp_path / "student")))
    assert {getattr(told, name) for name in lengths} == {60}


def test_the_line_of_a_model(saved: Path) -> None:
    scorer, encoder = load_encoder(str(saved), ["passage_length=40", 'query_prompt="which: "'])
    line = reading_line(scorer, encoder, ["owl", "bee"], LONG)
    told = "dual_encoder; pooling mean; query prompt 'which: '; query_length 130 and passage_length 40; cosine; fp32; "
    assert line == f"{saved}: {told}cut: 0.0% of 2 queries and 50.0% of 2 passages"


def test_the_line_says_by_what_a_run_compares_and_in_which_numbers(saved: Path) -> None:
    def line(*settings: str, teaches: bool = False) -> str:
        config = TeacherConfig(kind="dual_encoder", path=str(saved), scale="cosine")
        scorer, encoder = load_encoder(str(saved), ["normalize=false", *settings])
        if teaches:
            scorer = load_teacher(config.model_copy(update={"normalize": False}), torch.float32)
        return reading_line(scorer, encoder, [], [])

    assert line().endswith("; dot; fp32")
    assert line("scale=cosine", "dtype=bf16").endswith("; dot, layers by cosine; bf16, published in fp32")
    assert line(teaches=True).endswith("; cosine by its scale, dot where it serves; fp32")


def test_a_prompt_that_leaves_too_little_is_refused(saved: Path, tmp_path: Path) -> None:
    _, encoder = load_encoder(str(saved), ["query_length=12", "passage_length=12", 'query_prompt="which thing: "'])
    taken = len(encoder.tokenizer("which thing: ")["input_ids"])
    assert room(encoder) == {"query_length": 12 - taken}
    with pytest.raises(InputError, match=rf"student\.query_length: is 12, and its prompt leaves {12 - taken} tokens"):
        check_room(encoder, "student")
    asked = {"template": "plain", "max_length": 70}
    reranker = load_text(TeacherConfig(kind="llm_reranker", path=str(tiny_tokenizer(tmp_path, "bpe")), **asked))
    with pytest.raises(InputError, match=r"max_length: is 70, and its template leaves 0 tokens .*raise it to"):
        check_room(reranker, "")
