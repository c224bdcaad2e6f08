"""What cannot work is told in one line and leaves no folder that would be taken for a run; a run goes on with its own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.jobs import losses_of
from tests.helpers.launch import launch

Configure = Callable[..., Path]
JOB = "tests.engine.jobs:distil_each"

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "kernels": ({"kernels": "triton"}, "kernels: "),
    "nothing to learn": (
        {"losses": {name: {"weight": 0} for name in ("contrastive", "response", "layer")}},
        "every weight is 0",
    ),
    "overlap": ({"train": {"overlap": True}, "extra_teacher": {"placement": "zero3"}}, "train.overlap"),
    "new layer": ({"extra_teacher": {"projection": 7}}, "teacher.projection"),
    "scheduler": ({"deepspeed": {"student": {"scheduler": {"type": "WarmupLR"}}}}, "has a scheduler"),
    "misspelt": ({"deepspeed": {"student": {"zero_optimisation": {"stage": 2}}}}, "did you mean 'zero_optimization'?"),
    "batch": (
        {"deepspeed": {"student": {"train_batch_size": 77}}},
        "deepspeed.student: Check batch related parameters",
    ),
    "parameter": (
        {"deepspeed": {"student": {"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}}},
        "deepspeed.student: ",
    ),
    "its lr": (
        {"deepspeed": {"student": {"optimizer": {"type": "Adam", "params": {"lr": 0.5}}}}},
        "its optimizer's lr is 0.5, train.lr is 0.001",
    ),
    "optimizer": ({"deepspeed": {"student": {"optimizer": {"type": "Foo"}}}}, "deepspeed.student"),
    "section": ({"deepspeed": {"student": {"zero_optimization": True}}}, "zero_optimization is not an object"),
    "stage": ({"deepspeed": {"student": {"zero_optimization": {"stage": 7}}}}, "stage is 7"),
    "key": ({"deepspeed": {"student": {"zero_optimization": {"stage": 1, "bogus": 3}}}}, "deepspeed.student"),
    "teacher's": (
        {
            "deepspeed": {"teacher": {"zero_optimization": {"stage": 3, "offload_param": "cpu"}}},
            "extra_teacher": {"placement": "zero3"},
        },
        "zero_optimization.offload_param is not an object",
    ),
    # Told by the first step.
    "attention": (
        {"losses": {"attention": {"weight": 1.0, "k": 2, "relation_heads": 5}}, "extra_teacher": {"path": "bert"}},
        "5 heads do not divide",
    ),
    "width": (
        {"student": {"token_dim": 8}},
        "student.token_dim: is ignored by kind: dual_encoder (set projection",
    ),
    "length": (
        {"student": {"max_length": 8}},
        "student.max_length: is ignored by kind: dual_encoder (set query_length",
    ),
    "room": (
        {"student": {"query_prompt": "one two three four five six: ", "query_length": 16}},
        "student.query_length: is 16, and its prompt leaves",
    ),
    "repeated": ({"student": {"layers": [0, 1, 1]}}, "names a layer twice"),
}


def elsewhere(path: Path, *, output: str | None = None, **places: str) -> Path:
    """The configuration at `path` with other places: of its output, and of what sections read."""
    tree = yaml.safe_load(path.read_text())
    tree["output"] = output or tree["output"]
    for section, place in places.items():
        tree[section]["path"] = place
    path.write_text(yaml.safe_dump(tree))
    return path


def test_what_cannot_begin_is_told_and_leaves_no_run(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    paths = [str(configure(name, **sections)) for name, (sections, _) in CASES.items()]
    outputs = {name: tmp_path / name for name in CASES}
    for name, place in {"under a file": tmp_path / "file" / "run", "in proc": Path("/proc/nope/run")}.items():
        paths.append(str(elsewhere(configure(name), output=str(place))))
    (tmp_path / "file").touch()
    [results] = launch(JOB, 1, configs=paths)
    says = [*(says for _, says in CASES.values()), "cannot be made", "cannot be made"]
    for told, expected in zip(results, says, strict=True):
        assert isinstance(told, str), f"{expected}: {told}"
        assert expected in told
        assert "\n" not in told
    assert [name for name, output in outputs.items() if (output / "config.yaml").exists()] == []


def test_a_home_folder_is_found_wherever_it_stands(
    configure: Configure, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(rooms))
    evaluation = {"split": "dev", "metric": "RR@10", "measures": ["RR@10"]}
    path = configure("home", evaluation=evaluation, train={"steps": 2})
    elsewhere(path, output="~/run-of-home", data="~/data", student="~/student", teacher="~/llama")
    try:
        [[losses]] = launch(JOB, 1, configs=[str(path)])
        assert len(losses) == 2
        rows = [json.loads(line) for line in (rooms / "run-of-home" / "metrics.jsonl").read_text().splitlines()]
        assert any("evaluation" in row for row in rows)
    finally:
        shutil.rmtree(rooms / "run-of-home", ignore_errors=True)


def test_a_run_goes_on_with_the_texts_and_the_teacher_that_it_began_with(
    configure: Configure, rooms: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(rooms / "data", data)
    shutil.copytree(rooms / "llama", tmp_path / "teacher")
    run: dict[str, Any] = {"data": {"path": str(data)}, "extra_teacher": {"path": str(tmp_path / "teacher")}}
    path = configure("run", **run, evaluation={"split": "dev", "measures": ["nDCG@10"]})
    [[whole]] = launch(JOB, 1, configs=[str(path)])

    def again() -> Any:
        for step in (tmp_path / "run" / "checkpoints").glob("step-0000000[56]"):
            shutil.rmtree(step)
        [[told]] = launch(JOB, 1, configs=[str(path)], resume=True)
        return told

    groups = data / "train.jsonl"
    before = groups.read_text()
    groups.write_text("".join(reversed(before.splitlines(keepends=True))))
    told = again()
    assert "have changed: data: train" in told
    groups.write_text(before)
    weights = tmp_path / "teacher" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-8] + bytes(8))
    told = again()
    assert "have changed: teacher: model.safetensors" in told
    weights.write_bytes(kept)
    judged, template = data / "qrels" / "dev.tsv", tmp_path / "teacher" / "chat_template.jinja"
    before = judged.read_text()
    judged.write_text(before + before.splitlines()[-1] + "\n")  # they decide which step is the best
    template.write_text("{{ messages }}")
    told = again()
    assert "have changed: evaluation: qrels/dev.tsv, teacher: chat_template.jinja" in told
    judged.write_text(before)
    template.unlink()
    data.rename(tmp_path / "moved")  # where they lie may change
    elsewhere(path, data=str(tmp_path / "moved"))
    assert again() == whole == losses_of(tmp_path / "run")
