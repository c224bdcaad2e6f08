"""The commands over a model take its settings, say how they read it, and guess no kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lead_ds.cli.main import main
from tests.models.tiny_models import tiny_model


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, output and standard error of a command, run in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(x) for x in arguments])
    out, told = capfd.readouterr()
    return int(end.value.code or 0), out, told


SETTINGS = ("passage_prompt=read: ", "passage_length=20", "query_prompt=ask: ", "pooling=mean")


def test_every_command_takes_them(rooms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, data = rooms / "student", rooms / "data"
    line = f"{model}: dual_encoder; pooling mean; query prompt 'ask: '; passage prompt 'read: '; "
    line += "query_length 128 and passage_length 20; dot; fp32; cut: "

    status, _, told = run(capfd, "encode", "--model", model, "--data", data, "--out", tmp_path / "vectors", *SETTINGS)
    assert (status, line in told) == (0, True), told
    manifest = json.loads((tmp_path / "vectors" / "manifest.json").read_text())
    assert (manifest["prompt"], manifest["length"], manifest["model"]["pooling"]) == ("read: ", 20, "mean")
    again = run(
        capfd, "encode", "--model", model, "--data", data, "--out", tmp_path / "vectors", *SETTINGS, "dtype=bf16"
    )
    assert (again[0], "holds vectors" in again[2]) == (2, True), again[2]
    assert run(capfd, "index", "--vectors", tmp_path / "vectors", "--out", tmp_path / "index")[0] == 0

    over = ("--model", model, "--data", data, "--index", tmp_path / "index")
    given = [part for setting in SETTINGS for part in ("--set", setting)]
    status, out, told = run(capfd, "search", *over, *given, "--json", "who flies silently")
    assert (status, line in told, len(json.loads(out)["hits"])) == (0, True, 10), told
    status, _, told = run(capfd, "search", *over, "who flies silently")
    assert (status, "was made by another model: pooling mean, here cls" in told) == (2, True), told

    status, out, _ = run(capfd, "evaluate", *over, *SETTINGS, "--json", "-", "--measures", "nDCG@10")
    exact = run(capfd, "evaluate", *over[:4], *SETTINGS, "--json", "-", "--measures", "nDCG@10")[1]
    assert (status, json.loads(out)["mean"]) == (0, json.loads(exact)["mean"])

    groups = tmp_path / "groups.jsonl"
    status, _, told = run(capfd, "mine", "--model", model, "--data", data, "--out", groups, "--number", 3, *SETTINGS)
    assert (status, line in told) == (0, True), told
    status, _, told = run(
        capfd, "export", "--model", model, "--to", "sentence-transformers", tmp_path / "exported", *SETTINGS
    )
    assert status == 0, told
    prompts = json.loads((tmp_path / "exported" / "config_sentence_transformers.json").read_text())["prompts"]
    assert (prompts["query"], prompts["document"]) == ("ask: ", "read: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("encode", "passage_lenght=9"), "did you mean 'passage_length'?"),
        (("encode", "passes=2"), "error: passes: is of a model in a run"),
        (("encode", "kind=cross_encoder"), "holds a cross_encoder (a model of one vector a text is needed here"),
        (
            ("encode", "passage_length=9", "passage_prompt=one two three: "),
            "error: passage_length: is 9, and its prompt",
        ),
        (("mine", "pooling=mean"), "error: pooling=mean: is a setting of a model, and none is given"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    rooms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    command, *settings = arguments
    model = () if command == "mine" else ("--model", rooms / "student")
    status, out, told = run(capfd, command, *model, "--data", rooms / "data", "--out", tmp_path / "out", *settings)
    assert (status, out) == (2, "")
    assert says in told
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1


def test_a_language_model_is_no_dual_encoder_unless_it_is_named_one(
    rooms: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "llama", "llama", "causal")
    command = ("encode", "--model", model, "--data", rooms / "data", "--out", tmp_path / "vectors")
    status, _, told = run(capfd, *command)
    assert (status, "set kind=K" in told) == (2, True)
    status, _, told = run(capfd, *command, "kind=dual_encoder", "--kind", "queries")
    assert (status, "dual_encoder; pooling last; query_length 130" in told) == (0, True), told
